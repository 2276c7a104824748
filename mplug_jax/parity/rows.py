"""What one comparison says, and how close two float32 programs of the same model must be."""

from typing import NamedTuple

import numpy as np


class Tolerance(NamedTuple):
  """Largest accepted |ours - recorded|: the larger of `absolute` and `relative` x the largest |recorded|."""

  absolute: float
  relative: float = 0.0


# 5e-6 is about 40 steps of float32: it counts for numbers much larger than 1 (an image stream that
# many connected layers have added to, the loss of a long answer).
EXACT = Tolerance(0.0)
TENSOR = Tolerance(2e-5, 5e-6)
LOGITS = Tolerance(1e-4, 5e-6)  # and losses
SCORE = Tolerance(5e-5)  # sums of up to 30 log-probabilities
GRADIENT = Tolerance(1e-7, 1e-4)
NORM = Tolerance(1e-6, 2e-4)


class Row(NamedTuple):
  """One comparison.

  Name: of the recorded array. shape: the recorded one. error: max |ours - recorded|, inf where
  there
  is no number to give. relative: error / max |recorded|. tolerance: what `error` may be.
  """

  name: str
  shape: tuple
  error: float
  relative: float
  tolerance: float
  passed: bool
  note: str = ""


def compare(name, ours, recorded, tolerance, note=""):
  """Two arrays of any equal shape -> Row.

  Equal infinities agree, a NaN on either side is a failure.
  """
  ours, recorded = np.asarray(ours), np.asarray(recorded)
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
  ours, recorded = ours.astype(np.float64), recorded.astype(np.float64)
  with np.errstate(invalid="ignore"):
    difference = np.where(ours == recorded, 0.0, np.abs(ours - recorded))
  error = float(np.where(np.isnan(difference), np.inf, difference).max(initial=0.0))
  scale = float(np.abs(recorded[np.isfinite(recorded)]).max(initial=0.0))
  allowed = max(tolerance.absolute, tolerance.relative * scale)
  relative = error / scale if scale else (np.inf if error else 0.0)
  return Row(name, recorded.shape, error, relative, allowed, error <= allowed, note)
