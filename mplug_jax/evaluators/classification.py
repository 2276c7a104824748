"""Evaluation of statement classification on every record of a split."""

import os
from collections import Counter
from typing import Any

import numpy as np

from mplug_jax.data.errors import ImageError
from mplug_jax.data.examples import classification
from mplug_jax.data.images import ops
from mplug_jax.evaluators import common
from mplug_jax.evaluators.common import Predict
from mplug_jax.reporting import sample_sheet
from mplug_jax.runtime import atomic_files

_GAP = 8  # White pixels between the images of a row.
_TABLE_LABELS = 6  # Confusion tables of more classes are written to the file, but not printed.


class ClassificationEvaluator:
  """Classifies all records of a split; writes predictions, confusion table and sample sheet."""

  metric = "accuracy"  # Printed last, and decides which checkpoint is best.

  def __init__(self, config: Any, tokenizer: Any, workdir: str):
    """Opens the split.

    Args:
      config: config of the run.
      tokenizer: tokenizer of the run.
      workdir: folder to write results to.
    """
    self.config = config
    self.workdir = workdir
    self.labels = list(config.data.labels)
    self.source: Any = classification.get_source(config.data, config.eval.split)
    self.transform = classification.make_transform(config, tokenizer, train=False)
    self.samples: list[str] = []  # Sample predictions of the last run.

  def run(
    self, predict: Predict, process_index: int = 0, process_count: int = 1
  ) -> dict[str, float]:
    """Evaluates.

    Args:
      predict: {"classify": function of a batch of this process}; it returns {name: array with the
        rows of all processes}, which include "index", "mask" and "corrupt" of the batch.
      process_index: number of this process.
      process_count: number of processes.

    Returns:
      {name: percent}: accuracy; accuracy_<label> of the records with that true label;
      accuracy_<subset> of the subsets of the source (pairs of shape and color that training never
      shows are "unseen"); majority_label, the share of the most frequent label. None of these for
      records without labels. `corrupt_rows`, if any, is the number of records with an unreadable
      image; they are classified without it and count.
    """
    predictions = []
    corrupt = 0
    for index, out, unreadable in common.rows(
      self.config, self.source, self.transform, predict["classify"], process_index, process_count
    ):
      row = self.source.row(index)
      predictions.append(
        row
        | {
          "index": index,
          "prediction": self.labels[int(out["probability"].argmax())],
          "scores": out["probability"],
        }
      )
      corrupt += unreadable
    known = [row for row in predictions if row["label"]]
    self.samples = [_line(row) for row in common.spread(predictions)]
    self.samples += common.unscored_note(len(known), len(predictions), "statements", "label")
    if known:
      table = self._confusion(known)
      self.samples += self._table_lines(table) if len(self.labels) <= _TABLE_LABELS else []
    if process_index == 0:
      self._write(predictions, table if known else None)
    result = self._accuracies(known) if known else {}
    return result | ({"corrupt_rows": corrupt} if corrupt else {})

  def _accuracies(self, known):
    right = {row["index"]: row["prediction"] == row["label"] for row in known}
    groups = {}
    for row in known:
      for name in (row["label"], *self.source.groups(row["index"])):
        groups.setdefault(name, []).append(right[row["index"]])
    _, most = Counter(row["label"] for row in known).most_common(1)[0]
    return (
      {"accuracy": 100 * float(np.mean(list(right.values())))}
      | {
        f"accuracy_{name}": 100 * float(np.mean(rights)) for name, rights in sorted(groups.items())
      }
      | {"majority_label": 100 * most / len(known)}
    )

  def _confusion(self, known):
    """Counts records by true label (rows) and predicted label (columns), i64[C, C]."""
    table = np.zeros((len(self.labels),) * 2, np.int64)
    np.add.at(
      table,
      tuple([self.labels.index(row[name]) for row in known] for name in ("label", "prediction")),
      1,
    )
    return table

  def _table_lines(self, table):
    return [
      f"truth {label}: predicted "
      + ", ".join(f"{other} {count}" for other, count in zip(self.labels, counts))
      for label, counts in zip(self.labels, table)
    ]

  def _write(self, predictions, table):
    """Writes predictions.json, confusion.json if labels are known, and predictions.png."""
    atomic_files.write_json(
      os.path.join(self.workdir, "predictions.json"),
      [
        {
          "id": row["id"],
          "label": row["prediction"],
          "scores": {label: round(float(p), 6) for label, p in zip(self.labels, row["scores"])},
        }
        for row in predictions
      ],
    )
    if table is not None:
      atomic_files.write_json(
        os.path.join(self.workdir, "confusion.json"),
        {"labels": self.labels, "truth_by_prediction": table.tolist()},
      )
    self._write_sheet(predictions)

  def _write_sheet(self, predictions):
    """Writes predictions.png: images of the first records, sentence, prediction and label."""
    images = []
    samples = []
    size = max(self.config.model.image_size, common.SHEET_PIXELS // 2)
    for row in predictions:
      if len(images) == common.SHEET_IMAGES:
        break
      try:
        images.append(_side_by_side(self.source[row["index"]]["images"], size))
      except ImageError:
        continue
      samples.append([sample_sheet.Sample(row["sentence"], row["prediction"], row["label"])])
    if images:
      sample_sheet.sample_sheet(images, samples, os.path.join(self.workdir, "predictions.png"))


def _line(row):
  return f"{row['sentence']} -> {row['prediction']}" + (
    f"   (truth: {row['label']})" if row["label"] else ""
  )


def _side_by_side(images, size):
  """Joins images to u8[size, N size + gaps, 3]. Raises ImageError if one is unreadable."""
  parts = [ops.eval_transform(ops.decode_image(image), size) for image in images]
  gap = np.full((size, _GAP, 3), 255, np.uint8)
  return np.concatenate([part for image in parts for part in (gap, image)][1:], axis=1)
