"""Evaluation of grounding with boxes that cannot be used; the predicted boxes are given."""

import json

import numpy as np
import pytest

from mplug_jax.data.errors import RecordError
from mplug_jax.evaluators.grounding import GroundingEvaluator
from tests.support.grounding_case import WordTokenizer
from tests.support.grounding_files import config, write_jsonl

PREDICTED = (5.0, 5.0, 30.0, 20.0)


def locate(batch):
  """Predicts the same box for every expression."""
  out = {name: batch[name] for name in ("index", "mask", "corrupt", "size")}
  box = np.zeros(batch["box"].shape, np.float32) + np.array(PREDICTED, np.float32)
  return out | {"box": box, "nearest": box, "score": np.zeros(box.shape[:2], np.float32)}


def evaluated(folder, entries, **changes):
  write_jsonl(folder, entries)  # images of 60 x 40 pixels
  c = config(f"tiny,data=jsonl,root={folder}", eval__split="val", eval__limit=0, **changes)
  evaluator = GroundingEvaluator(c, WordTokenizer(), str(folder))
  result = evaluator.run({"locate": locate})
  return result, {row["id"]: row for row in json.loads((folder / "predictions.json").read_text())}


def entry(box, name):
  return {"image": "a.png", "text": "the dog", "box": box, "id": name}


def test_a_bad_box_keeps_its_row_and_does_not_count(tmp_path, caplog):
  entries = [
    entry([5, 5, 30, 20], "right"),
    entry([100, 100, 120, 130], "outside"),
    entry([20, 10, 10, 30], "empty"),
    entry([40, 30, 60, 40], "wrong"),
  ]
  result, rows = evaluated(tmp_path, entries)
  assert result["acc@0.5"] == 50
  assert result["bad_boxes"] == 2
  assert list(rows) == ["right", "outside", "empty", "wrong"]
  assert [row["iou"] for row in rows.values()] == [1.0, None, None, 0.0]
  assert rows["outside"]["box"] == list(PREDICTED)
  text = caplog.text
  assert f"{tmp_path}/val.jsonl, line 3: the box" in text
  assert f"{tmp_path}/val.jsonl, line 2, id outside: the box (100, 100, 120, 130)" in text
  with pytest.raises(RecordError, match="line 3: the box .* is empty"):
    evaluated(tmp_path, entries, data__strict=True)
  with pytest.raises(ValueError, match="line 2, id outside: the box .* lies outside its image"):
    evaluated(tmp_path, entries[:2], data__strict=True)


def test_without_bad_boxes_none_are_reported(tmp_path):
  result, _ = evaluated(tmp_path, [entry([5, 5, 30, 20], "a"), entry([-5, 5, 30, 20], "cut")])
  assert result["acc@0.5"] == 100
  assert "bad_boxes" not in result
