"""Grounding runs: a tiny run on scenes, resumed halfway, and evaluation on other images."""

import contextlib
import io
import json
import os
import shutil
import signal
import types

import numpy as np
import pytest
from PIL import Image

from mplug_jax import data, main
from mplug_jax.checkpoints import manager as checkpoint
from mplug_jax.data import boxes
from mplug_jax.data.sources import grounding
from mplug_jax.data.sources.chunked import Chunked
from mplug_jax.data.text import tokenizer as tokenizers
from mplug_jax.evaluators import grounding as evaluator
from mplug_jax.reporting import metric_log, progress
from mplug_jax.training import loop
from tests.support import tiny_run
from tests.support.grounding_files import painted, png
from tests.support.grounding_task_case import config

pytestmark = pytest.mark.usefixtures("drawn_start")

STEPS = 4


def settings(**changes):
  return config(
    **{
      "total_steps": STEPS,
      "log_every": 1,
      "eval__limit": 40,  # of two expressions each
      **changes,
    }
  )


def program(c, workdir, mode="train", checkpoint=""):
  """mplug_jax.main with this config -> (exit status, lines it printed)."""
  out = io.StringIO()
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
    for name, value in dict(
      CONFIG=c, _WORKDIR=str(workdir), _MODE=mode, _CHECKPOINT=str(checkpoint), _COORDINATOR=""
    ).items():
      patch.setattr(main, name, types.SimpleNamespace(value=value))
    with pytest.raises(SystemExit) if mode == "train" else contextlib.nullcontext() as stop:
      main.main(["main"])
  return (stop.value.code if mode == "train" else 0), out.getvalue().splitlines()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  folder = tmp_path_factory.mktemp("unbroken")
  status, lines = program(settings(), folder)
  assert status == 0
  return folder, lines


def test_files_and_output_of_a_run(unbroken):
  folder, lines = unbroken
  rows = json.loads((folder / "predictions.json").read_text())
  source = data.get_source(settings(), "test")
  expressions = [e for i in range(40) for e in source.expressions(i)]
  assert [row["expression"] for row in rows] == [e["text"] for e in expressions]
  assert len({row["id"] for row in rows}) == 80
  truth, found = (
    np.array([x["box"] for x in values], np.float64) for values in (expressions, rows)
  )
  overlaps = boxes.iou(found, truth)
  np.testing.assert_allclose([row["iou"] for row in rows], overlaps, atol=1e-6)
  assert all(row["score"] < 0 and len(row["box"]) == 4 for row in rows)
  assert found.min() >= 0
  assert found.max() <= 48
  result = json.loads((folder / "result.json").read_text())
  assert result["metric"] == "acc@0.5"
  assert lines[-1] == f"final: acc@0.5 {result['metrics']['acc@0.5']:.2f}"
  assert result["metrics"]["acc@0.5"] == pytest.approx(100 * (overlaps >= 0.5).mean())
  assert result["metrics"]["mean_iou"] == pytest.approx(overlaps.mean(), abs=1e-6)
  assert {f"acc@0.5_{name}" for name in ("relation", "plain", "seen", "unseen")} <= set(
    result["metrics"]
  )
  assert result["metrics"]["nearest_acc@0.5"] == 100
  assert result["metrics"]["nearest_mean_iou"] > 0.9
  assert result["metrics"]["constant_box"] < 50
  with Image.open(folder / "predictions.png") as sheet:
    pixels = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 24)}
  assert {(214, 40, 40), (0, 170, 60)} <= pixels  # both kinds of boxes
  logged = metric_log.read_metrics(folder / "metrics.jsonl")
  assert [row["train/loss"] for row in logged if "train/loss" in row][-1] > 0
  assert logged[-1]["test/acc@0.5"] == result["metrics"]["acc@0.5"]


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(unbroken, tmp_path):
  update = progress.Progress.update

  def hooked(self, done, loss=None):
    if done == 2 and loss is None:
      os.kill(os.getpid(), signal.SIGTERM)
    return update(self, done, loss)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(progress.Progress, "update", hooked)
    status, lines = program(settings(), tmp_path)
  assert status == 0
  assert lines[-1].startswith("stopped at step 2")
  status, lines = program(settings(), tmp_path)
  assert status == 0
  assert lines[-1] == unbroken[1][-1]
  assert tiny_run.lines(tmp_path) == tiny_run.lines(unbroken[0])
  for name in ("predictions.json", "result.json"):
    assert (tmp_path / name).read_bytes() == (unbroken[0] / name).read_bytes()
  c = settings()
  abstract = loop.build(c, tokenizers.load(tmp_path / "tokenizer"), STEPS, 20_000 // 8).abstract
  states = []
  for folder in (tmp_path, unbroken[0]):
    with contextlib.closing(checkpoint.Manager(folder)) as manager:
      states.append(tiny_run.flat(manager.restore(abstract)[0]))
  assert all(states[0][name].tobytes() == x.tobytes() for name, x in states[1].items())
  assert states[0].keys() == states[1].keys()


def test_custom_images_without_boxes_and_one_unreadable(unbroken, tmp_path):
  (tmp_path / "wide.png").write_bytes(png(painted(30, 90, red=(50, 5, 80, 25))))
  (tmp_path / "broken.png").write_bytes(b"no image")
  entries = [
    {"image": "wide.png", "text": "The red thing", "box": [50, 5, 80, 25], "id": "a"},
    {"image": "wide.png", "text": "the thing", "box": [1, 1, 89, 29], "id": "b"},
    {"image": "wide.png", "text": "the other thing", "id": "c"},
    {"image": "broken.png", "text": "the circle", "box": [1, 2, 3, 4], "id": "d"},
  ]
  for name in ("train.jsonl", "val.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
  c = config(f"tiny,data=jsonl,root={tmp_path},res=48")
  status, lines = program(c, tmp_path / "out", "evaluate", unbroken[0])
  rows = {row["id"]: row for row in json.loads((tmp_path / "out" / "predictions.json").read_text())}
  assert list(rows) == ["a", "b", "c", "d"]
  assert rows["c"]["iou"] is None
  assert rows["d"]["iou"] == 0
  for name, truth in (("a", [50, 5, 80, 25]), ("b", [1, 1, 89, 29])):
    assert rows[name]["iou"] == pytest.approx(
      float(boxes.iou(np.array(rows[name]["box"]), np.array(truth, np.float64))), abs=1e-6
    )
  hits = sum(rows[name]["iou"] >= 0.5 for name in "abd")
  assert lines[-1] == f"final: acc@0.5 {100 * hits / 3:.2f}"
  assert "  corrupt_images: 1.00" in lines


class Known:
  """A predict function that gives the true boxes moved by a share of their width."""

  def __init__(self, source, shift):
    self._source, self._shift = source, shift

  def __call__(self, batch):
    out = {name: batch[name] for name in ("index", "mask", "corrupt", "size")}
    box = np.zeros(batch["box"].shape, np.float32)
    for row in np.flatnonzero(batch["mask"]):
      for i, e in enumerate(self._source.expressions(int(batch["index"][row]))):
        box[row, i] = np.array(e["box"]) + np.array([1, 0, 1, 0]) * self._shift * (
          e["box"][2] - e["box"][0]
        )
    return out | {"box": box, "nearest": box, "score": np.zeros(box.shape[:2], np.float32)}


@pytest.mark.parametrize(
  ("shift", "accuracy", "overlap"),
  [(0.0, 100, 1.0), (0.3, 100, 0.7 / 1.3), (0.35, 0, 0.65 / 1.35), (2.0, 0, 0.0)],
)
def test_metric_of_known_boxes(tmp_path, shift, accuracy, overlap):
  c = settings(eval__limit=0, eval__batch_size=64)
  evaluation = evaluator.GroundingEvaluator(
    c, types.SimpleNamespace(pad_id=0, bos_id=2, eos_id=3, encode=lambda text: [2]), str(tmp_path)
  )
  evaluation.source = Chunked(
    grounding.ExpressionRecords([data.get_source(c, "test")[i] for i in range(30)]),
    2,
    "expressions",
  )
  result = evaluation.run({"locate": Known(evaluation.source, shift)})
  assert result["acc@0.5"] == accuracy
  assert result["mean_iou"] == pytest.approx(overlap, abs=1e-3)
  assert {result[f"acc@0.5_{name}"] for name in ("relation", "plain")} == {accuracy}
  predicted = [row["box"] for row in json.loads((tmp_path / "predictions.json").read_text())]
  assert np.min(predicted) >= 0
  assert np.max(predicted) == 48 if shift == 2.0 else np.max(predicted) <= 48  # pixels of a scene


def test_wrong_config_raises_before_anything_is_written(tmp_path):
  for changes, message in (
    ({"task__bins": 200}, "config.tokenizer.locations=201"),
    ({"data__name": "coco"}, "known sources: scenes"),
    ({"task__box_weights": "x"}, "per_example, batch, none"),
  ):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    with pytest.raises(ValueError, match=message):
      loop.train(settings(tokenizer__records=20, **changes), str(tmp_path / "run"))
    assert not list(tmp_path.glob("run/checkpoints/*"))
