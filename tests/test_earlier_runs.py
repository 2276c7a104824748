"""Files that an earlier version wrote (commit 0c375fb) still load, resume, evaluate and export.

tests/fixtures/runs_of_0c375fb.tar.xz holds a VQA run of four steps that stopped at step 2, its
export to PyTorch, a folder converted from that export, and what that version computed from them.
"""

import json
import tarfile

import numpy as np
import pytest

import mplug_jax
from mplug_jax.config import resume
from mplug_jax.conversion import exporter
from mplug_jax.tensor_files import open
from mplug_jax.training import workdir
from tests.support import paths, tiny_run

SCENE = paths.ROOT / "docs" / "scene.png"
SETTINGS = {
  "total_steps": 4,
  "checkpoint.every": 2,
  "checkpoint.keep": 4,
  "log_every": 1,
  "data.questions_per_image": 2,
  "batch_size": 8,
}


@pytest.fixture
def earlier(tmp_path):
  with tarfile.open(paths.FIXTURES / "runs_of_0c375fb.tar.xz") as archive:
    archive.extractall(tmp_path, filter="data")
  return tmp_path


@pytest.fixture
def expected(earlier):
  return json.loads((earlier / "expected.json").read_text())


@pytest.mark.parametrize("name", ["run", "converted"])
def test_predictor_answers_as_the_earlier_version(name, earlier, expected):
  model = mplug_jax.Predictor.load(earlier / name, tokenizer=earlier / "run" / "tokenizer")
  for question, text, score in expected[name]:
    answer = model.answer(SCENE, question)
    assert answer.text == text
    assert answer.score == pytest.approx(score, abs=1e-4)


def test_run_resumes_with_the_steps_of_the_earlier_version(earlier, expected):
  run = earlier / "run"
  settings = SETTINGS | {"prng_impl": "jax"}
  printed = tiny_run.finish(tiny_run.start(run, settings, devices=1))
  steps = {row["step"]: row for row in tiny_run.lines(run) if "train/loss" in row}
  assert sorted(steps) == [1, 2, 3, 4]
  for row in expected["metrics"]:
    for name, value in row.items():
      assert steps[row["step"]][name] == pytest.approx(value, rel=1e-5), name
  assert printed[-1] == f"final: accuracy {expected['final']['test/accuracy']:.2f}"
  assert not any("resuming with a difference" in line for line in printed)


def test_run_is_evaluated(earlier):
  flags = ("--mode=evaluate", f"--checkpoint={earlier / 'run'}")
  printed = tiny_run.finish(tiny_run.start(earlier / "out", SETTINGS, *flags, devices=1))
  assert printed[-1] == "final: accuracy 37.93"


def test_run_with_renamed_keys_loads_resumes_and_exports(earlier, expected, monkeypatch):
  path = earlier / "run" / "config.json"
  config = json.loads(path.read_text())
  config["model"]["width_of_text"] = config["model"].pop("hidden_size")
  config["tokenizer"]["kind"] = "pieces"
  path.write_text(json.dumps(config))
  monkeypatch.setitem(resume.RENAMED_KEYS, "model.width_of_text", "model.hidden_size")
  monkeypatch.setitem(resume.RENAMED_VALUES, "tokenizer.kind", {"pieces": "sentencepiece"})
  model = mplug_jax.Predictor.load(earlier / "run")
  for question, text, _ in expected["run"]:
    assert model.answer(SCENE, question).text == text
  present = tiny_run.config()
  present.update_from_flattened_dict(SETTINGS)
  workdir.open_workdir(present, str(earlier / "run"), resuming=True)
  path.write_text(json.dumps(config))
  exporter.export_torch(earlier / "run", earlier / "renamed.safetensors", slim=True)
  before = open.open_tensors(earlier / "export.safetensors")
  assert sorted(before) == sorted(open.open_tensors(earlier / "renamed.safetensors"))


def test_run_exports_the_tensors_of_the_earlier_export(earlier):
  exporter.export_torch(earlier / "run", earlier / "again.safetensors", slim=True)
  before = open.open_tensors(earlier / "export.safetensors")
  after = open.open_tensors(earlier / "again.safetensors")
  assert sorted(before) == sorted(after)
  for name in before:
    np.testing.assert_array_equal(before[name], after[name], err_msg=name)
