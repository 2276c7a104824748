"""Checks of machine, config and data before training (mplug_jax/doctor.py, training/preflight)."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mplug_jax import doctor
from mplug_jax.runtime.accelerators import unused_accelerator
from mplug_jax.training.preflight import machine
from tests.support import tiny_run

pytestmark = pytest.mark.usefixtures("drawn_start")


@pytest.fixture
def settings(tmp_path):
  """Config of eight questions about eight image files; the last file is not an image."""
  rng = np.random.default_rng(0)
  rows = [
    {"image": f"{i}.png", "question": f"what is number {i}?", "answer": "a picture"}
    for i in range(8)
  ]
  for row in rows[:-1]:
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / row["image"])
  (tmp_path / "7.png").write_bytes(b"no image")
  for split in ("train", "val", "test"):
    (tmp_path / f"{split}.jsonl").write_text(
      "".join(json.dumps(row) + "\n" for row in (rows if split == "train" else rows[:-1]))
    )
  c = importlib.import_module("configs.vqa").get_config(f"tiny,data=jsonl,root={tmp_path}")
  c.update_from_flattened_dict(tiny_run.SETTINGS)
  return c


def test_doctor_accepts_a_trainable_config_with_warnings(settings, tmp_path, capsys):
  before = sorted(tmp_path.iterdir())
  assert doctor.examine(settings, str(tmp_path / "runs" / "new")) == 0
  out = capsys.readouterr().out
  assert "verdict   this will train, 2 warnings" in out
  assert "train: 1 of 8 images cannot be read" in out
  assert "1 of 8 images of the first batch cannot be read" in out
  assert "of 8 examples" in out
  assert "image uint8[8, 32, 32, 3]" in out
  assert "tokens of" not in out
  losses = [float(x) for x in out.partition("updates   loss ")[2].partition(" with")[0].split(", ")]
  assert len(losses) == 4
  assert losses[-1] < losses[0]
  assert sorted(tmp_path.iterdir()) == before  # nothing is written


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda c: c.data.update({"train_files": ("/nowhere/train.jsonl",)}),
      "data.train_files names /nowhere/train.jsonl",
    ),
    (
      lambda c: c.data.update({"strict": True}),
      "train: config.data.strict=True, and 1 of 8 images cannot be read",
    ),
    (
      lambda c: c.tokenizer.update({"kind": "wordpiece"}),
      "config.tokenizer.path must name the vocab.txt",
    ),
    (
      lambda c: c.update({"total_epochs": 0, "total_steps": 0}),
      "Set config.total_steps or config.total_epochs",
    ),
  ],
)
def test_doctor_reports_why_a_config_cannot_train(settings, tmp_path, capsys, change, message):
  change(settings)
  assert doctor.examine(settings, str(tmp_path)) > 0
  out = capsys.readouterr().out
  assert f"error     {message}" in out
  assert "verdict   this will not train, " in out


def test_doctor_does_not_run_a_step_that_exceeds_memory(settings, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(machine, "available_memory", lambda: 1 << 20)
  assert doctor.examine(settings, str(tmp_path)) == 1
  out = capsys.readouterr().out
  assert "GiB a device, which has 0.0: lower config.batch_size" in out
  assert "updates" not in out.partition("first took")[2]


@pytest.mark.parametrize(
  ("backend", "environment", "files", "expected"),
  [
    ("cpu", {}, (), ""),
    ("cpu", {}, ("/dev/nvidia0",), "gpu"),
    ("cpu", {}, ("/dev/accel0",), "tpu"),
    ("cpu", {"TPU_NAME": "x"}, (), "tpu"),
    ("gpu", {}, ("/dev/nvidia0",), ""),
    ("cpu", {"JAX_PLATFORMS": "cpu"}, ("/dev/nvidia0",), ""),
  ],
)
def test_unused_accelerator(backend, environment, files, expected):
  assert unused_accelerator(backend, environment, files.__contains__) == expected


def test_unknown_config_is_a_one_line_error():
  done = subprocess.run(
    [sys.executable, "-m", "mplug_jax.doctor", "--config=configs/none.py"],
    cwd=tiny_run.ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1
  assert done.stderr.startswith("error: ")
  assert "configs/none.py" in done.stderr
  assert len(done.stderr.splitlines()) == 1
