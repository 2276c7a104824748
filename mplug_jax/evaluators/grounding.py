"""Evaluation of visual grounding on every expression of a split: accuracy at IoU 0.5."""

import os
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mplug_jax.data import boxes
from mplug_jax.data.errors import BadRecords, ImageError
from mplug_jax.data.examples import grounding
from mplug_jax.data.images import box_transforms, ops
from mplug_jax.data.sources.chunked import Chunked
from mplug_jax.evaluators import common
from mplug_jax.evaluators.common import Predict
from mplug_jax.reporting import sample_sheet
from mplug_jax.runtime import atomic_files

_RED = (214, 40, 40)
_GREEN = (0, 170, 60)
_CORRECT = 0.5  # smallest IoU of a correct box


class GroundingEvaluator:
  """Locates all expressions of a split and scores the boxes; writes them and a sample sheet."""

  metric = "acc@0.5"  # Printed last, and decides which checkpoint is best.

  def __init__(self, config: Any, tokenizer: Any, workdir: str):
    """Opens the split.

    Args:
      config: config of the run.
      tokenizer: tokenizer of the run.
      workdir: folder to write results to.
    """
    self.config = config
    self.workdir = workdir
    data = config.data
    self.source: Any = Chunked(
      grounding.get_source(data, config.eval.split), data.expressions_per_image, "expressions"
    )
    self.transform = grounding.make_transform(config, tokenizer, train=False)
    self.samples: list[str] = []  # Sample predictions of the last run.

  def run(
    self, predict: Predict, process_index: int = 0, process_count: int = 1
  ) -> dict[str, float]:
    """Evaluates.

    Args:
      predict: {"locate": function of a batch of this process}; it returns {name: array with the
        rows of all processes}, which include "index", "mask" and "corrupt" of the batch.
      process_index: number of this process.
      process_count: number of processes.

    Returns:
      {name: number}, accuracies in percent: acc@0.5; mean_iou; where known, acc@0.5 of expressions
      with and without a relation, and of seen and unseen pairs of shape and color; constant_box,
      acc@0.5 of the mean true box for all expressions; nearest_..., the scores of the true boxes
      after quantization to location tokens. None of these without true boxes. `corrupt_images`, if
      any, is the number of unreadable images; their expressions count as missed. `bad_boxes`, if
      any, is the number of unusable true boxes; their expressions do not count.
    """
    predictions, corrupt = self._predict(predict["locate"], process_index, process_count)
    self.samples = [
      f"{p['expression']['text']} -> {_numbers(p['box'])}"
      + ("" if p["iou"] is None else f"   (IoU {p['iou']:.2f})")
      for p in common.spread(predictions)
    ]
    if process_index == 0:
      atomic_files.write_json(
        os.path.join(self.workdir, "predictions.json"),
        [_row(p) for p in predictions],
      )
      self._write_sheet(predictions)
    notes = {"corrupt_images": len(corrupt)} if corrupt else {}
    bad = getattr(self.source.source, "bad", BadRecords()).count
    bad += sum(p["outside"] for p in predictions)
    notes |= {"bad_boxes": bad} if bad else {}
    scored = [p for p in predictions if p["iou"] is not None]
    self.samples += common.unscored_note(len(scored), len(predictions), "expressions", "box")
    return (_metrics(scored) if scored else {}) | notes

  def _predict(self, locate, process_index, process_count):
    """Returns predictions for all expressions in order, and the ids of unreadable images."""
    predictions = []
    corrupt = set()
    for index, out, unreadable in common.rows(
      self.config, self.source, self.transform, locate, process_index, process_count
    ):
      if unreadable:
        corrupt.add(self.source[index]["image_id"])
      for i, expression in enumerate(self.source.expressions(index)):
        uncut, nearest = (out[name][i].astype(np.float64).round(3) for name in ("box", "nearest"))
        truth = expression["box"]
        outside = False
        if truth is not None and not unreadable:
          outside = boxes.inside(truth, *out["size"]) is None
          truth = None if outside else truth
        predictions.append(
          {
            "id": expression.get("id", f"{index}-{i}"),
            "index": index,
            "expression": expression,
            "size": out["size"],
            "outside": outside,
            "box": boxes.cut(uncut, out["size"]),
            "score": float(out["score"][i]),
            "iou": None if truth is None else 0.0 if unreadable else _iou(uncut, truth),
            "nearest": None if truth is None or unreadable else _iou(nearest, truth),
          }
        )
    return predictions, corrupt

  def _write_sheet(self, predictions):
    """Writes predictions.png: an expression per image, predicted box red, true box green."""
    by_image = {}
    for prediction in predictions:
      by_image.setdefault(prediction["index"], []).append(prediction)
    # Scenes alternate expressions with and without a relation; pairs of images show both.
    chosen = [group[i // 2 % len(group)] for i, group in enumerate(by_image.values())]
    common.write_sheet(
      os.path.join(self.workdir, "predictions.png"),
      self._drawn(chosen),
      self.config.model.image_size,
    )

  def _drawn(self, chosen):
    """Yields (picture, [Sample])."""
    for prediction in chosen:
      try:
        image = ops.decode_image(self.source[prediction["index"]]["image"])
      except ImageError:
        continue
      expression = prediction["expression"]
      if prediction["iou"] is None:
        sample = sample_sheet.Sample(expression["text"], _numbers(prediction["box"]), "", "open")
      else:
        verdict = "right" if prediction["iou"] >= _CORRECT else "wrong"
        sample = sample_sheet.Sample(
          expression["text"], f"IoU {prediction['iou']:.2f}", "", verdict
        )
      truth = None if prediction["outside"] else expression["box"]
      yield _picture(image, truth, prediction["box"]), [sample]


def _row(prediction):
  """Returns the entry of predictions.json: the box cut at the edges of its image, with its IoU.

  The metrics compare the box on the canvas, as the official code does, which is never better.
  """
  truth = prediction["expression"]["box"]
  return {
    "id": prediction["id"],
    "expression": prediction["expression"]["text"],
    "box": prediction["box"].tolist(),
    "score": prediction["score"],
    "iou": _iou(prediction["box"], truth) if prediction["iou"] else prediction["iou"],
  }


def _iou(box, truth):
  return float(boxes.iou(box, np.asarray(truth, np.float64)))


def _numbers(box):
  return "[" + ", ".join(f"{x:.0f}" for x in box) + "]"


def _percent(overlaps):
  return 100 * float(np.mean(np.asarray(overlaps) >= _CORRECT))


def _metrics(scored):
  """Returns the results of expressions with a known box."""
  overlaps = np.array([p["iou"] for p in scored])
  result = {"acc@0.5": _percent(overlaps), "mean_iou": float(overlaps.mean())}
  for key, yes, no in (("needs_relation", "relation", "plain"), ("unseen", "unseen", "seen")):
    for flag, name in ((True, yes), (False, no)):
      part = [p["iou"] for p in scored if p["expression"].get(key) is flag]
      if part:
        result[f"acc@0.5_{name}"] = _percent(part)
  readable = [p for p in scored if p["nearest"] is not None]
  if readable:
    result["constant_box"] = _constant_box(
      [p["expression"]["box"] for p in readable], [p["size"] for p in readable]
    )
    nearest = [p["nearest"] for p in readable]
    result |= {"nearest_acc@0.5": _percent(nearest), "nearest_mean_iou": float(np.mean(nearest))}
  return result


def _constant_box(truths, sizes):
  """Returns acc@0.5 of the mean true box, as shares of the image, for all expressions."""
  shares = np.array(truths, np.float64) / np.tile(np.array(sizes, np.float64), 2)
  return _percent(boxes.iou(np.broadcast_to(shares.mean(0), shares.shape), shares))


def _picture(image, truth, predicted):
  """Draws boxes on the image, centered in a white square of common.SHEET_PIXELS."""
  factor = max(1, common.SHEET_PIXELS // max(image.shape))
  image = image.repeat(factor, 0).repeat(factor, 1)
  drawn = [box for box in (truth, predicted) if box is not None]
  canvas = box_transforms.fit(image, np.array(drawn, np.float64) * factor, common.SHEET_PIXELS)
  left, top, right, bottom = canvas.placed
  picture = np.full_like(canvas.image, 255)
  picture[top:bottom, left:right] = canvas.image[top:bottom, left:right]
  picture = Image.fromarray(picture)
  draw = ImageDraw.Draw(picture)
  for box, color in zip(canvas.boxes, (_RED,) if truth is None else (_GREEN, _RED)):
    # Pillow requires ordered ends; a predicted width may be 0.
    x1, y1, x2, y2 = np.clip(box, 0, common.SHEET_PIXELS - 1)
    draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=color, width=2)
  return np.array(picture)
