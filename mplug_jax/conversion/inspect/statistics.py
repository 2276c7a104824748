"""Statistics of one array and of the difference of two, in float64 by chunks."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_CHUNK = 1 << 22  # numbers converted to float64 at a time


class Moments(NamedTuple):
  """Moments of the finite numbers of an array.

  Attributes:
    count: how many numbers are finite.
    mean: their mean.
    m2: their sum of squared deviations from the mean.
    bad: how many numbers are not finite.
  """

  count: int = 0
  mean: float = 0.0
  m2: float = 0.0
  bad: int = 0

  def merge(self, other: "Moments") -> "Moments":
    """Returns the moments of both sets of numbers together."""
    count = self.count + other.count
    if not count:
      return self._replace(bad=self.bad + other.bad)
    delta = other.mean - self.mean
    return Moments(
      count,
      self.mean + delta * other.count / count,
      self.m2 + other.m2 + delta * delta * self.count * other.count / count,
      self.bad + other.bad,
    )

  @property
  def std(self) -> float:
    """Standard deviation; NaN without finite numbers."""
    return math.sqrt(self.m2 / self.count) if self.count else math.nan


def moments(array: np.ndarray) -> Moments:
  """Returns the moments of an array of any numeric dtype, computed in float64 by chunks."""
  total = Moments()
  for chunk in _chunks(array):
    finite = np.isfinite(chunk)
    x = chunk if finite.all() else chunk[finite]
    mean = x.mean() if len(x) else 0.0
    total = total.merge(
      Moments(len(x), float(mean), float(np.square(x - mean).sum()), len(chunk) - len(x))
    )
  return total


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
  flat = np.asarray(array).reshape(-1)
  for start in range(0, len(flat), _CHUNK):
    yield flat[start : start + _CHUNK].astype(np.float64)


class Difference(NamedTuple):
  """Difference of two arrays a and b of equal shape.

  Attributes:
    max: largest |a - b|; inf if only one of two numbers is finite.
    squares: sum of (a - b)^2.
    reference: sum of a^2.
  """

  max: float = 0.0
  squares: float = 0.0
  reference: float = 0.0

  def merge(self, other: "Difference") -> "Difference":
    """Returns the difference over both pairs of arrays."""
    return Difference(
      max(self.max, other.max), self.squares + other.squares, self.reference + other.reference
    )

  @property
  def relative(self) -> float:
    """L2 norm of the difference divided by that of the first array."""
    if self.reference:
      return math.sqrt(self.squares / self.reference)
    return math.inf if self.squares else 0.0


def difference(a: np.ndarray, b: np.ndarray) -> Difference:
  """Compares two arrays of equal shape; two NaNs and two equal infinities count as equal."""
  total = Difference()
  with np.errstate(invalid="ignore"):
    for x, y in zip(_chunks(a), _chunks(b), strict=True):
      distance = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y))
      distance[np.isnan(distance)] = np.inf
      total = total.merge(
        Difference(
          float(distance.max()),
          float(np.square(distance).sum()),
          float(np.square(x[np.isfinite(x)]).sum()),
        )
      )
  return total
