"""Parity with the official code: everything that a recorded file holds, against what our model computes from its weights."""

from typing import NamedTuple

import jax
import numpy as np

from mplug_jax.parity import caption, grounding, retrieval, videocap, vqa
from mplug_jax.parity.recording import Recording, Unusable
from mplug_jax.parity.rows import Row

TASKS = {
  "vqa": vqa,
  "caption": caption,
  "videocap": videocap,
  "retrieval": retrieval,
  "grounding": grounding,
}


class Report(NamedTuple):
  """rows: of rows.Row, one for each comparison.

  Skipped: {name: why}, not compared on purpose. unchecked: names of
  recorded results that no check knows.
  """

  task: str
  rows: list
  skipped: dict
  unchecked: list

  @property
  def failed(self):
    return [row for row in self.rows if not row.passed]


def verify(path):
  """Runs every check of a recorded file. Path of an .npz file -> Report.

  A check that stops with an error becomes a failed row; the others still run. Products are computed
  in full float32, on any device.

  Raises:
    Unusable: the file cannot be read, lacks `meta` or weights, or is of an unknown task.
  """
  recording = Recording(path)
  if recording.task not in TASKS:
    raise Unusable(f"{path}: unknown task {recording.task!r}; known are {', '.join(TASKS)}.")
  rows = []
  with jax.default_matmul_precision("highest"):
    if not _run(rows, "conversion of sd/", lambda: recording.params and ()):
      return Report(recording.task, rows, recording.skipped, [])
    checks = []
    _run(
      rows,
      f"inputs of {recording.task}",
      lambda: checks.extend(TASKS[recording.task].checks(recording)) or (),
    )
    for name, check in checks:
      _run(rows, name, check)
  return Report(recording.task, rows, recording.skipped, recording.unchecked)


def _run(rows, name, check):
  """Appends a check's rows; an error becomes a failed row. Returns whether it ran to the end."""
  try:
    for row in check():
      rows.append(row)
  except Exception as e:  # whatever is wrong with one recorded thing must not hide the others
    reason = (str(e) or "no message").splitlines()[0][:200]
    rows.append(Row(name, (), np.inf, np.inf, 0.0, False, f"{type(e).__name__}: {reason}"))
    return False
  return True
