"""Reads lists and numbers saved by torch.save (annotations, for example), without running any code.

Both formats are read without PyTorch: the zip archive, and the one from before PyTorch 1.6, which
most data sets use. NumPy numbers and arrays are supported as far as annotation lists use them;
anything else becomes an inert torch_types.Placeholder.
"""

import io
import math
import os
import pickletools
from typing import Any

import numpy as np

from mplug_jax.tensor_files import torch_archive, torch_unpickler

_DTYPES = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"f2", "f4", "f8"}
_MAX_FILE = 1 << 31  # the largest list of a known data set has about 40 MB


class _DType:
  """A NumPy dtype as pickled: a name, then its byte order."""

  __slots__ = ("name", "order")

  def __init__(self, name: Any) -> None:
    self.name = name
    self.order = "="

  def __setstate__(self, state: Any) -> None:
    if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|"):
      self.order = state[1]

  def read(self, data: Any, count: int) -> list[Any]:
    """Returns `count` numbers from bytes (a string in Python 2 pickles)."""
    data = data.encode("latin-1") if isinstance(data, str) else data
    if self.name not in _DTYPES or not isinstance(data, bytes):
      raise ValueError(f"numbers of type {self.name!r}")
    dtype = np.dtype(self.order + self.name)
    if len(data) != count * dtype.itemsize:
      raise ValueError(f"{len(data)} bytes for {count} numbers")
    return np.frombuffer(data, dtype).tolist()


class Array:
  """A NumPy array: `values` has its numbers in file order, or None for an unsupported dtype."""

  __slots__ = ("values",)

  def __init__(self) -> None:
    self.values: list[Any] | None = None

  def __setstate__(self, state: Any) -> None:
    try:
      _, shape, dtype, _, data = state
      self.values = dtype.read(data, math.prod(shape))
    except (TypeError, ValueError, AttributeError):
      self.values = None


def _bytes(text: Any, codec: str = "latin1") -> bytes:
  """Decodes bytes that Python 3 pickled as text for Python 2."""
  if codec not in ("latin1", "latin-1") or not isinstance(text, str):
    raise ValueError("unknown bytes")
  return text.encode("latin-1")


_FUNCTIONS = {"_codecs.encode": _bytes, "numpy.dtype": lambda name="", *unused: _DType(name)}
for _core in ("numpy.core", "numpy._core"):  # before and since numpy 2
  _FUNCTIONS |= {
    f"{_core}.multiarray._reconstruct": lambda *unused: Array(),
    f"{_core}.multiarray.scalar": lambda dtype, data: dtype.read(data, 1)[0],
  }
_NAMES = {name: torch_unpickler.Function(function) for name, function in _FUNCTIONS.items()}


def _legacy_pickle(data: bytes, path: str) -> bytes:
  """Returns the fourth pickle of a legacy file, after magic number, version and system."""
  file = io.BytesIO(data)
  begin = 0
  try:
    for _ in range(4):
      begin = file.tell()
      for _ in pickletools.genops(file):
        pass
  except Exception as error:  # untrusted bytes can raise any exception
    raise ValueError(f"{path}: truncated or damaged ({error}); get the file again.") from error
  return data[begin : file.tell()]


def load(path: str | os.PathLike) -> Any:
  """Loads the object in a file of torch.save.

  Returns:
    Dicts, lists, tuples, strings and numbers; `Array` for a NumPy array.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a file by torch.save, or damaged.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise FileNotFoundError(f"{path} does not exist or is not a file.")
  if os.path.getsize(path) > _MAX_FILE:
    raise ValueError(
      f"{path} has more than {_MAX_FILE >> 30} GiB, so it is not a list of annotations."
    )
  with open(path, "rb") as file:
    data = file.read(64)
    if data.startswith(b"PK\x03\x04"):
      data = torch_archive.Archive(path, file).read_all("data.pkl")
    elif data.startswith(torch_archive.LEGACY_MAGIC):
      data = _legacy_pickle(data + file.read(), path)
    else:
      raise ValueError(f"{path} is not a file that torch.save wrote.")
  return torch_unpickler.load(data, path, _NAMES)[0]


def numbers(value: Any) -> list[float] | None:
  """Converts a list, tuple or `Array` of numbers; None for anything else, tensors included."""
  value = value.values if isinstance(value, Array) else value
  if not isinstance(value, (list, tuple)) or not all(isinstance(x, (int, float)) for x in value):
    return None
  return [float(x) for x in value]
