"""Lists and numbers that torch.save wrote (annotations, for instance), without running what is in the file.

Both forms are read without PyTorch: the zip archive, and the one from before PyTorch 1.6, in which most lists of data sets
are. numpy's numbers and arrays are understood as far as lists of annotations have them; anything else stays an inert
torch_pickle.Placeholder.
"""

import io
import math
import os
import pickletools

import numpy as np

from mplug_jax.tensor_files import torch_archive, torch_unpickler

_DTYPES = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"f2", "f4", "f8"}
_MAX_FILE = 1 << 31  # the largest list of a known data set has about 40 MB


class _DType:
  """A number type as numpy pickles it: a name, then its byte order."""

  __slots__ = ("name", "order")

  def __init__(self, name):
    self.name, self.order = name, "="

  def __setstate__(self, state):
    if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|"):
      self.order = state[1]

  def read(self, data, count):
    """`count` numbers from bytes (of Python 2: a string). Raises ValueError."""
    data = data.encode("latin-1") if isinstance(data, str) else data
    if self.name not in _DTYPES or not isinstance(data, bytes):
      raise ValueError(f"numbers of type {self.name!r}")
    dtype = np.dtype(self.order + self.name)
    if len(data) != count * dtype.itemsize:
      raise ValueError(f"{len(data)} bytes for {count} numbers")
    return np.frombuffer(data, dtype).tolist()


class Array:
  """A numpy array: `values`, its numbers in the order of the file, or None if it has others than plain ones."""

  __slots__ = ("values",)

  def __init__(self):
    self.values = None

  def __setstate__(self, state):
    try:
      _, shape, dtype, _, data = state
      self.values = dtype.read(data, math.prod(shape))
    except (TypeError, ValueError, AttributeError):
      self.values = None


def _bytes(text, codec="latin1"):
  """Python 3 writes bytes as text for Python 2 to read."""
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


def _legacy_pickle(data, path):
  """The bytes of a file from before PyTorch 1.6 -> its fourth pickle, after magic number, version and system."""
  file = io.BytesIO(data)
  try:
    for _ in range(4):
      begin = file.tell()
      for _ in pickletools.genops(file):
        pass
  except Exception as error:  # the bytes of a stranger fail in any way
    raise ValueError(f"{path}: cut short or damaged ({error}); get the file again.") from error
  return data[begin : file.tell()]


def load(path):
  """The object in a file by torch.save: dicts, lists, tuples, strings and numbers; `Array` for a numpy array.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a file by torch.save, or damaged.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise FileNotFoundError(f"{path} does not exist or is not a file.")
  if os.path.getsize(path) > _MAX_FILE:
    raise ValueError(
      f"{path} has more than {_MAX_FILE >> 30} GiB, so it is no list of annotations."
    )
  with open(path, "rb") as file:
    data = file.read(64)
    if data.startswith(b"PK\x03\x04"):
      data = torch_archive.Archive(path, file).whole("data.pkl")
    elif data.startswith(torch_archive.LEGACY_MAGIC):
      data = _legacy_pickle(data + file.read(), path)
    else:
      raise ValueError(f"{path} is not a file that torch.save wrote.")
  return torch_unpickler.load(data, path, _NAMES)[0]


def numbers(value):
  """A list, tuple or `Array` of numbers -> list of float; None for anything else, tensors included."""
  value = value.values if isinstance(value, Array) else value
  if not isinstance(value, (list, tuple)) or not all(isinstance(x, (int, float)) for x in value):
    return None
  return [float(x) for x in value]
