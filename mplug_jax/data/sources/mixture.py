"""Several sources as one, in given proportions."""

import bisect

import numpy as np


class Mixture:
  """A source whose epoch shows the records of each source in proportion to its weight, and every record at least once.

  Sources with more than their natural share are repeated. Records have `id`, the number of their
  image in the source, less than the source's length; here it becomes unique over all sources.

  Args:
    sources: random-access sources of dicts. weights: positive numbers, one a source; None: by their
      sizes, so that an epoch shows every record once.

  Raises:
    ValueError: no sources, an empty one, or weights that do not fit.
  """

  def __init__(self, sources, weights=None):
    sizes = [len(source) for source in sources]
    if not sizes or min(sizes) < 1:
      raise ValueError(f"A mixture needs sources with records; these have {sizes}.")
    weights = np.array(sizes if weights is None else weights, np.float64)
    if weights.shape != (len(sizes),) or not (np.isfinite(weights) & (weights > 0)).all():
      raise ValueError(
        f"A mixture of {len(sizes)} sources needs as many positive weights, not {weights.tolist()}."
      )
    self.sources, self._sizes = list(sources), sizes
    counts = np.maximum(np.rint(weights * (np.array(sizes) / weights).max()).astype(int), sizes)
    self._ends = np.cumsum(counts).tolist()
    self._first_id = [0, *np.cumsum(sizes).tolist()]

  def __len__(self):
    return self._ends[-1]

  def _place(self, index):
    """Record number -> (number of its source, record number there)."""
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} is not among the {len(self)} of the mixture")
    number = bisect.bisect_right(self._ends, index)
    start = self._ends[number - 1] if number else 0
    return number, (index - start) % self._sizes[number]

  def __getitem__(self, index):
    number, place = self._place(index)
    record = self.sources[number][place]
    return record | {"id": self._first_id[number] + record["id"]}
