"""A run whose folder is gs://bucket/run: nothing of it is written to this machine's disk."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from mplug_jax.checkpoints import manager
from mplug_jax.conversion import exporter, importer
from mplug_jax.inference.predictor import Predictor
from mplug_jax.runtime import files
from mplug_jax.training import evaluate, loop
from tests.support import fake_gcs, tiny_run, train_case

pytestmark = pytest.mark.usefixtures("one_device")

RUN = "gs://bucket/runs/vqa"
SETTINGS = train_case.SETTINGS | {"total_steps": 4, "checkpoint.every": 2}


def _config(**changes):
  c = tiny_run.config()
  c.update_from_flattened_dict(SETTINGS | {k.replace("__", "."): v for k, v in changes.items()})
  return c


@pytest.fixture(scope="module")
def store():
  with pytest.MonkeyPatch.context() as patch, fake_gcs.serve(patch) as served:
    yield served


@pytest.fixture(scope="module")
def remote(store, tmp_path_factory):
  """A run on gs:// that was stopped after step 3 and resumed; the empty folder it ran in."""
  folder = tmp_path_factory.mktemp("working_directory")
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    with pytest.MonkeyPatch.context() as interrupting:
      train_case.send_at(interrupting, signal.SIGTERM, 3)
      assert loop.train(_config(), RUN) == 0
    assert "bucket/runs/vqa/checkpoints/3/commit_success.txt" in store.objects
    assert "bucket/runs/vqa/result.json" not in store.objects
    assert loop.train(_config(), RUN) == 0
  return folder


def _json(store, name):
  return json.loads(store.objects[f"bucket/runs/{name}"][0])


def test_stopped_and_resumed_run_equals_an_uninterrupted_one_on_disk(store, remote, tmp_path):
  assert loop.train(_config(), str(tmp_path)) == 0
  assert tiny_run.lines(RUN) == tiny_run.lines(tmp_path)
  for name in ("config.json", "result.json", "predictions.json"):
    assert _json(store, f"vqa/{name}") == json.loads((tmp_path / name).read_text())
  local = {
    str(path.relative_to(tmp_path))
    for path in tmp_path.rglob("*")
    if path.is_file() and "checkpoints" not in path.parts
  }
  assert local == {
    name.removeprefix("bucket/runs/vqa/")
    for name in store.objects
    if "/vqa/" in name and "/checkpoints/" not in name
  }


def test_evaluate_and_warm_start(store, remote, monkeypatch):
  monkeypatch.chdir(remote)
  result = evaluate.evaluate(_config(), "gs://bucket/runs/evaluated", RUN)
  assert result == _json(store, "vqa/result.json")["metrics"]
  assert _json(store, "evaluated/predictions.json") == _json(store, "vqa/predictions.json")
  assert loop.train(_config(init__paths=(RUN,)), "gs://bucket/runs/next") == 0
  assert set(_json(store, "next/init.json").values()) == {RUN}


def test_predictor(remote, monkeypatch):
  monkeypatch.chdir(remote)
  predictor = Predictor.load(RUN, devices=jax.devices()[:1])
  (answer,) = predictor.answer([np.zeros((64, 64, 3), np.uint8)], ["what is the blue shape?"])
  assert isinstance(answer.text, str)


def test_nothing_was_written_to_the_working_directory(remote):
  assert os.listdir(remote) == []


def test_rows_of_metrics_are_uploaded_before_each_checkpoint(store, remote):
  """A killed run then lacks no line of the steps before the checkpoint it resumes from."""
  uploads = [name.removeprefix("bucket/runs/vqa/") for name in store.uploads]
  first = uploads.index("checkpoints/2/commit_success.txt")
  assert "metrics.jsonl" in uploads[:first]


def test_paths_that_cannot_be_written_are_refused():
  tiny_run.refused(lambda: files.open_path("memory://x/y"), "memory:// is not supported")
  tiny_run.refused(lambda: manager.Manager("s3://bucket/run"), "a local folder or to gs:// only")
  tiny_run.refused(lambda: exporter.export_torch(RUN, "gs://bucket/x.pth"), "needs a local path")
  tiny_run.refused(lambda: importer.convert_checkpoint("gs://bucket/x.pth", "out"), "a local path")
