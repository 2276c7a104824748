"""Numbers of arrays that are NaN or infinite."""

from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

# dtype -> (unsigned integers of its size, bits of its exponent, which are all set in NaN and inf).
_EXPONENTS = {
  np.dtype(np.float16): (np.uint16, 0x7C00),
  np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
}
_CHUNK = 1 << 18  # numbers; a chunk and its flags stay in the cache
_NAMED = 10  # arrays that a sentence names


def count_nonfinite(array: np.ndarray) -> int:
  """Returns how many numbers of an array are NaN or infinite; 0 for integers.

  Args:
    array: of any shape and dtype. A GiB of float32 takes 0.1 s, of 16 bits 0.2 s.
  """
  array = np.asarray(array)
  if array.dtype.kind in "biu" or not array.size:
    return 0
  flat = array.ravel(order="K")
  unsigned, exponent = _EXPONENTS.get(array.dtype, (None, 0))
  if unsigned is None and array.dtype.kind not in "fc":
    flat = flat.astype(np.float32)  # smaller types of ml_dtypes
  count = 0
  for start in range(0, flat.size, _CHUNK):
    chunk = flat[start : start + _CHUNK]
    if unsigned is None:
      bad = ~np.isfinite(chunk)
    else:
      bad = (chunk.view(unsigned) & unsigned(exponent)) == exponent
    count += int(np.count_nonzero(bad))
  return count


class NonFiniteError(ValueError):
  """Raised by a function that `checked` returns.

  Attributes:
    name: of the array.
  """

  def __init__(self, name: str) -> None:
    super().__init__(f"{name} has values that are not finite.")
    self.name = name


def checked(name: str, load: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
  """Returns a function that calls `load` and raises NonFiniteError for NaN or infinity.

  Args:
    name: of the array.
    load: makes the array.
  """

  def load_checked() -> np.ndarray:
    array = load()
    if count_nonfinite(array):
      raise NonFiniteError(name)
    return array

  return load_checked


def describe(counts: Mapping[str, int]) -> str:
  """Returns "7 values of 2 tensors are not finite: NAME (5), NAME (2)".

  Args:
    counts: {name of a tensor: number of its values that are not finite}, not empty.
  """
  named = ", ".join(f"{name} ({count:,})" for name, count in list(counts.items())[:_NAMED])
  more = ", ..." if len(counts) > _NAMED else ""
  total = sum(counts.values())
  values = "1 value" if total == 1 else f"{total:,} values"
  tensors = "1 tensor" if len(counts) == 1 else f"{len(counts)} tensors"
  return f"{values} of {tensors} {'is' if total == 1 else 'are'} not finite: {named}{more}"
