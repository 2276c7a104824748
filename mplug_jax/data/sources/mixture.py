"""Several sources as one, in given proportions."""

import bisect
from collections.abc import Sequence

import numpy as np

from mplug_jax.data.sources.source import Record, Source


class Mixture:
  """A source whose epochs show each source in proportion to its weight.

  An epoch shows every record at least once; sources with more than their natural share are
  repeated. Records have `id`, the number of their image in the source, less than the source's
  length; here it becomes unique over all sources.

  Attributes:
    sources: the sources.
  """

  def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None):
    """Makes the mixture.

    Args:
      sources: sources of records with `id`.
      weights: a positive number for each source; None: their sizes, so that an epoch shows every
        record once.

    Raises:
      ValueError: there are no sources, one is empty, or the weights do not fit.
    """
    sizes = [len(source) for source in sources]
    if not sizes or min(sizes) < 1:
      raise ValueError(f"A mixture needs sources with records; these have {sizes}.")
    shares = np.array(sizes if weights is None else weights, np.float64)
    if shares.shape != (len(sizes),) or not (np.isfinite(shares) & (shares > 0)).all():
      raise ValueError(
        f"A mixture of {len(sizes)} sources needs as many positive weights, not {shares.tolist()}."
      )
    self.sources = list(sources)
    self._sizes = sizes
    counts = np.maximum(np.rint(shares * (np.array(sizes) / shares).max()).astype(int), sizes)
    self._ends = np.cumsum(counts).tolist()
    self._first_id = [0, *np.cumsum(sizes).tolist()]

  def __len__(self) -> int:
    return self._ends[-1]

  def _find(self, index: int) -> tuple[int, int]:
    """Returns the number of a record's source, and its number there."""
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} is not among the {len(self)} of the mixture")
    number = bisect.bisect_right(self._ends, index)
    start = self._ends[number - 1] if number else 0
    return number, (index - start) % self._sizes[number]

  def __getitem__(self, index: int) -> Record:
    number, position = self._find(index)
    record = self.sources[number][position]
    return record | {"id": self._first_id[number] + record["id"]}
