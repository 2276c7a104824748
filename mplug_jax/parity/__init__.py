"""Parity with the official code: recorded results against those of this model, equal weights."""

import os
from collections.abc import Callable, Iterable
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
  """Result of the checks of a recorded file.

  Attributes:
    task: task of the file.
    rows: a row for each comparison.
    skipped: {name: reason} of results that are not compared on purpose.
    unchecked: names of recorded results that no check reads.
  """

  task: str
  rows: list[Row]
  skipped: dict[str, str]
  unchecked: list[str]

  @property
  def failed(self) -> list[Row]:
    """Rows outside their tolerance."""
    return [row for row in self.rows if not row.passed]


def verify(path: str | os.PathLike[str]) -> Report:
  """Runs every check of a recorded file.

  A check that stops with an error becomes a failed row; the others still run. Products are computed
  in full float32, on any device.

  Args:
    path: .npz file.

  Raises:
    Unusable: the file cannot be read, lacks `meta` or weights, or is of an unknown task.
  """
  recording = Recording(path)
  if recording.task not in TASKS:
    raise Unusable(f"{path}: unknown task {recording.task!r}; known are {', '.join(TASKS)}.")
  rows: list[Row] = []
  checks = []

  def convert() -> list[Row]:
    _ = recording.params
    return []

  def make_checks() -> list[Row]:
    checks.extend(TASKS[recording.task].checks(recording))
    return []

  with jax.default_matmul_precision("highest"):
    if not _run(rows, "conversion of sd/", convert):
      return Report(recording.task, rows, recording.skipped, [])
    _run(rows, f"inputs of {recording.task}", make_checks)
    for name, check in checks:
      _run(rows, name, check)
  return Report(recording.task, rows, recording.skipped, recording.unchecked)


def _run(rows: list[Row], name: str, check: Callable[[], Iterable[Row]]) -> bool:
  """Appends the rows of a check; an error becomes a failed row. Returns whether it completed."""
  try:
    for row in check():
      rows.append(row)  # noqa: PERF402 - the rows before an error stay
  except Exception as e:  # An error in one check must not hide the others.
    reason = (str(e) or "no message").splitlines()[0][:200]
    rows.append(Row(name, (), np.inf, np.inf, 0.0, False, f"{type(e).__name__}: {reason}"))
    return False
  return True
