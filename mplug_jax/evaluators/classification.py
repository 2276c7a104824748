"""Evaluates the classification of statements about images on every record of a split."""

import os
from collections import Counter

import numpy as np

from mplug_jax.data.errors import ImageError
from mplug_jax.data.examples import classification
from mplug_jax.data.images import ops
from mplug_jax.evaluators import common
from mplug_jax.reporting import sample_sheet
from mplug_jax.runtime import atomic_files

_GAP = 8  # white pixels between the images of a row
_TABLE_LABELS = 6  # a confusion table of more classes is in its file alone


class ClassificationEvaluator:
  """Classifies all records of a split, leaves predictions, the confusion table and a picture in the run's folder."""

  metric = "accuracy"  # the one that the run's last line and the best checkpoint go by

  def __init__(self, config, tokenizer, workdir):
    self.config, self.workdir = config, workdir
    self.labels = list(config.data.labels)
    self.source = classification.get_source(config.data, config.eval.split)
    self.transform = classification.make_transform(config, tokenizer, train=False)
    self.samples = []  # of the last run, one line of text each

  def run(self, predict, process_index=0, process_count=1):
    """Evaluates.

    Args:
      predict: {"classify": function batch of this process -> {name: array of all processes' rows}}, see tasks/classification.py.
      process_index, process_count: of this process.

    Returns:
      {name: percent}: accuracy; accuracy_<label> of the records that truly have it; accuracy_<subset>, where the source names
      subsets (held-out pairs of shape and colour are "unseen"); majority_label, the share of the most frequent one. None of these
      when no label is known. `corrupt_rows`, when there are any, is the number of records with an image that could not be read;
      they are classified without it, and count.
    """
    found, corrupt = [], 0
    for index, out, unreadable in common.rows(
      self.config, self.source, self.transform, predict["classify"], process_index, process_count
    ):
      row = self.source.row(index)
      found.append(
        row
        | {
          "index": index,
          "prediction": self.labels[int(out["probability"].argmax())],
          "scores": out["probability"],
        }
      )
      corrupt += unreadable
    known = [row for row in found if row["label"]]
    self.samples = [_line(row) for row in common.spread(found)]
    if known:
      table = self._confusion(known)
      self.samples += self._table_lines(table) if len(self.labels) <= _TABLE_LABELS else []
    if process_index == 0:
      self._write(found, table if known else None)
    return (self._accuracies(known) if known else {}) | (
      {"corrupt_rows": corrupt} if corrupt else {}
    )

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
    """i64[C, C]: records by true label (rows) and predicted label (columns)."""
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

  def _write(self, found, table):
    """predictions.json, confusion.json when truths are known, and predictions.png."""
    atomic_files.write_json(
      os.path.join(self.workdir, "predictions.json"),
      [
        {
          "id": row["id"],
          "label": row["prediction"],
          "scores": {label: round(float(p), 6) for label, p in zip(self.labels, row["scores"])},
        }
        for row in found
      ],
    )
    if table is not None:
      atomic_files.write_json(
        os.path.join(self.workdir, "confusion.json"),
        {"labels": self.labels, "truth_by_prediction": table.tolist()},
      )
    self._write_sheet(found)

  def _write_sheet(self, found):
    """The first records: the images side by side, the sentence, prediction and truth beneath; nothing when none can be read."""
    images, samples = [], []
    for row in found:
      if len(images) == common.SHEET_IMAGES:
        break
      try:
        images.append(
          _side_by_side(
            self.source[row["index"]]["images"],
            max(self.config.model.image_size, common.SHEET_PIXELS // 2),
          )
        )
      except ImageError:
        continue
      samples.append([sample_sheet.Sample(row["sentence"], row["prediction"], row["label"])])
    if images:
      sample_sheet.sample_sheet(
        np.stack(images), samples, os.path.join(self.workdir, "predictions.png")
      )


def _line(row):
  return f"{row['sentence']} -> {row['prediction']}" + (
    f"   (truth: {row['label']})" if row["label"] else ""
  )


def _side_by_side(images, size):
  """Images of any kind and size -> u8[size, N size + gaps, 3]. Raises ImageError for one that cannot be read."""
  parts = [ops.eval_transform(ops.decode_image(image), size) for image in images]
  gap = np.full((size, _GAP, 3), 255, np.uint8)
  return np.concatenate([part for image in parts for part in (gap, image)][1:], axis=1)
