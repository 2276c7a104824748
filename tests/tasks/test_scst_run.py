"""Runs of self-critical training after captioning: resumed, and with two processes."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from mplug_jax.checkpoints import manager as checkpoint
from mplug_jax.data.text import tokenizer as tokenizers
from mplug_jax.reporting import metric_log, progress
from mplug_jax.training import loop
from tests.support import caption_run, tiny_run

pytestmark = pytest.mark.usefixtures("one_device")

STEPS = 4
SETTINGS = {
  "task.beams": 1,
  "task.max_length": 12,
  "task.count": 3,
  "log_every": 1,
  "total_steps": STEPS,
  "eval.limit": 10,
  "data.records": 16,
  "optim.lr": 1e-4,
  "optim.clip": 0.0,
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  """Changes -> a config that continues a captioning run of a few updates."""
  folder = tmp_path_factory.mktemp("caption")
  common = {"compilation_cache": "", "model__image_size": 48, "data__size": 48}
  run(
    caption_run.config(
      "tiny", **common, task__beams=1, task__max_length=12, eval__limit=10, total_steps=2
    ),
    folder,
  )

  def make(**changes):
    given = {name.replace(".", "__"): value for name, value in SETTINGS.items()}
    return caption_run.config(f"tiny,init={folder}", "caption_scst", **given | common | changes)

  return make


def run(config, workdir):
  """-> what the run printed."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    assert loop.train(config, str(workdir)) == 0
  return out.getvalue().splitlines()


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory):
  """A finished run: (its folder, what it printed)."""
  folder = tmp_path_factory.mktemp("unbroken")
  return folder, run(settings(), folder)


def _state(folder, config):
  built = loop.build(config, tokenizers.load(folder / "tokenizer"), STEPS, 8)
  with contextlib.closing(checkpoint.Manager(folder)) as manager:
    return tiny_run.flat(manager.restore(built.abstract)[0])


@pytest.mark.slow
def test_run_starts_from_captioning_with_its_tokenizer(settings, unbroken):
  folder, out = unbroken
  start = settings().init.paths[0]
  assert set(json.loads((folder / "init.json").read_text()).values()) == {start}
  assert (
    tokenizers.load(folder / "tokenizer").fingerprint
    == tokenizers.load(f"{start}/tokenizer").fingerprint
  )
  result = json.loads((folder / "result.json").read_text())
  assert result["metric"] == "CIDEr-D"
  assert out[-1] == f"final: CIDEr-D {result['metrics']['CIDEr-D']:.2f}"
  rows = [row for row in metric_log.read_metrics(folder / "metrics.jsonl") if "train/reward" in row]
  assert len(rows) == STEPS
  for row in rows:
    assert row["train/reward"] == pytest.approx(
      row["train/baseline"], rel=1e-4, abs=1e-6
    )  # the mean of all candidates
    assert 1 <= row["train/length"] <= 12
    assert 0 <= row["train/unfinished"] <= 1


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(
  settings, unbroken, tmp_path, monkeypatch
):
  update = progress.Progress.update
  with monkeypatch.context() as patch:
    patch.setattr(
      progress.Progress,
      "update",
      lambda self, step, loss=None: (
        update(self, step, loss),
        step == 2 and loss is None and os.kill(os.getpid(), signal.SIGTERM),
      ),
    )
    assert run(settings(), tmp_path)[-1].startswith("stopped at step 2")
  assert "resumed at step 2" in run(settings(), tmp_path)
  ours, expected = _state(tmp_path, settings()), _state(unbroken[0], settings())
  assert all(ours[name].tobytes() == x.tobytes() for name, x in expected.items())
  assert (tmp_path / "predictions.json").read_bytes() == (
    unbroken[0] / "predictions.json"
  ).read_bytes()


@pytest.mark.slow
def test_two_processes_equal_one(settings, unbroken, tmp_path):
  """Each process rewards its rows; captions, rewards and losses are those of one process."""
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  given = SETTINGS | {
    "model.image_size": 48,
    "data.size": 48,
    "compilation_cache": "",
    "mesh.data": 2,
  }
  flags = re.sub(r"(device_count)=\d+", r"\1=1", os.environ["XLA_FLAGS"])
  processes = [
    subprocess.Popen(
      [
        sys.executable,
        str(tiny_run.ROOT / "tests" / "support" / "main_worker.py"),
        "0",
        "0",
        f"--config={tiny_run.ROOT}/configs/caption_scst.py:tiny,init={settings().init.paths[0]}",
        f"--workdir={tmp_path}",
        f"--coordinator=localhost:{port}",
        "--processes=2",
        f"--process={i}",
        *(f"--config.{k}={v}" for k, v in given.items()),
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=os.environ
      | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(tiny_run.ROOT)},
    )
    for i in range(2)
  ]
  first, second = map(tiny_run.finish, processes)
  assert first[-1] == unbroken[1][-1]
  assert not [line for line in second if line.startswith("final")]
  ours, expected = tiny_run.lines(tmp_path), tiny_run.lines(unbroken[0])
  assert [row["step"] for row in ours] == [row["step"] for row in expected]
  for row, other in zip(ours, expected):
    for name, value in other.items():
      assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (row["step"], name)
  assert json.loads((tmp_path / "predictions.json").read_text()) == json.loads(
    (unbroken[0] / "predictions.json").read_text()
  )
