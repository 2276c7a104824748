"""Comparisons, and the tolerances between two float32 programs of the same model."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np


class Tolerance(NamedTuple):
  """Largest accepted |ours - recorded|.

  Attributes:
    absolute: absolute tolerance.
    relative: tolerance relative to the largest |recorded|; the larger of the two counts.
  """

  absolute: float
  relative: float = 0.0


# 5e-6 is about 40 steps of float32; it matters for numbers much larger than 1 (an image stream that
# many connected layers have added to, the loss of a long answer).
EXACT = Tolerance(0.0)
TENSOR = Tolerance(2e-5, 5e-6)
LOGITS = Tolerance(1e-4, 5e-6)  # and losses
SCORE = Tolerance(5e-5)  # sums of up to 30 log-probabilities
GRADIENT = Tolerance(1e-7, 1e-4)
NORM = Tolerance(1e-6, 2e-4)


class Row(NamedTuple):
  """One comparison.

  Attributes:
    name: name of the recorded array.
    shape: shape of the recorded array.
    error: max |ours - recorded|, inf if the arrays cannot be compared.
    relative: error / max |recorded|.
    tolerance: largest accepted error.
    passed: whether the error is accepted.
    note: further text.
  """

  name: str
  shape: tuple[int, ...]
  error: float
  relative: float
  tolerance: float
  passed: bool
  note: str = ""


# (name, function that yields rows)
Check: TypeAlias = tuple[str, Callable[[], Iterable[Row]]]


def compare(name: str, ours: Any, recorded: Any, tolerance: Tolerance, note: str = "") -> Row:
  """Compares two arrays; equal infinities agree, a NaN on either side is a failure.

  Args:
    name: name of the recorded array.
    ours: computed array.
    recorded: recorded array.
    tolerance: accepted error.
    note: further text for the row.
  """
  ours = np.asarray(ours)
  recorded = np.asarray(recorded)
  if ours.shape != recorded.shape:
    return Row(
      name,
      recorded.shape,
      np.inf,
      np.inf,
      tolerance.absolute,
      False,
      f"ours has shape {ours.shape}",
    )
  ours = ours.astype(np.float64)
  recorded = recorded.astype(np.float64)
  with np.errstate(invalid="ignore"):
    difference = np.where(ours == recorded, 0.0, np.abs(ours - recorded))
  error = float(np.where(np.isnan(difference), np.inf, difference).max(initial=0.0))
  scale = float(np.abs(recorded[np.isfinite(recorded)]).max(initial=0.0))
  allowed = max(tolerance.absolute, tolerance.relative * scale)
  relative = error / scale if scale else (np.inf if error else 0.0)
  return Row(name, recorded.shape, error, relative, allowed, error <= allowed, note)
