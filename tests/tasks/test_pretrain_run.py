"""Runs of pre-training on scenes and files."""

import json

import numpy as np
import pytest

from mplug_jax.checkpoints import reading
from mplug_jax.data import pipeline
from mplug_jax.training import evaluate, loop
from tests.support import tiny_run
from tests.support.pretrain_case import SMALL, config

# ---- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A finished tiny run of four updates."""
  folder = tmp_path_factory.mktemp("run")
  assert loop.train(config(**SMALL), folder) == 0
  return folder


@pytest.mark.slow
def test_resumed_run_restores_its_queues(run, tmp_path, monkeypatch):
  c = config(**SMALL, checkpoint__every=2)
  real, calls = pipeline.train_batches, []

  def short(*args, **options):
    calls.append(options["start_step"])
    for number, batch in enumerate(real(*args, **options)):
      if options["start_step"] == 0 and number == 2:
        raise OSError("the disk is gone")
      yield batch

  monkeypatch.setattr(loop.pipeline, "train_batches", short)
  with pytest.raises(OSError, match="the disk is gone"):
    loop.train(c, tmp_path)
  assert loop.train(c, tmp_path) == 0
  assert calls == [0, 2]
  ours, whole = (
    tiny_run.flat(
      {which: reading.load_arrays(folder, which) for which in ("params", "ema_params", "extra")}
    )
    for folder in (tmp_path, run)
  )
  assert ours.keys() == whole.keys()
  assert any("image_queue" in name for name in ours)
  for name, x in ours.items():
    np.testing.assert_array_equal(x, whole[name], err_msg=name)
  assert tiny_run.lines(tmp_path)[-1] == tiny_run.lines(run)[-1]


@pytest.mark.slow
def test_run_reports_zero_shot_retrieval(run):
  result = json.loads((run / "result.json").read_text())
  assert result["metric"] == "r_mean"
  assert 0 <= result["metrics"]["r_mean"] <= 100
  assert (run / "predictions.png").exists()
  losses_seen = tiny_run.lines(run)[0]
  assert {f"train/loss_{name}" for name in ("itc", "itm", "mlm", "prefix_lm")} <= losses_seen.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "changes", "metric"),
  [
    ("vqa", {}, "accuracy"),
    ("caption", {}, "CIDEr-D"),
    ("retrieval", {}, "r_mean"),
    ("video_qa", {}, "accuracy"),
  ],
)
def test_other_tasks_evaluate_the_run_zero_shot(run, name, changes, metric, tmp_path):
  c = config(
    "tiny" if name == "video_qa" else "tiny,data=scenes", name, **SMALL, eval__limit=8, **changes
  )
  result = evaluate.evaluate(c, tmp_path, run)
  assert np.isfinite(result[metric])
  assert (tmp_path / "predictions.json").exists()


@pytest.mark.slow
def test_warm_starts_from_and_to_other_checkpoints(run, tmp_path):
  c = config(f"tiny,data=scenes,init={run}", "vqa", **SMALL, total_steps=1)
  assert loop.train(c, tmp_path / "vqa") == 0
  origins = json.loads((tmp_path / "vqa" / "init.json").read_text())
  assert set(origins.values()) == {str(run)}


def test_invalid_config_values_raise(tmp_path):
  with pytest.raises(ValueError, match="both clip=FOLDER and bert=FOLDER"):
    config("base,clip=x")
  with pytest.raises(ValueError, match="data='coco' is unknown; there are scenes, files, jsonl"):
    config("base,data=coco")
