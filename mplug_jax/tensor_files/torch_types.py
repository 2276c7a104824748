"""Inert replacements for the PyTorch objects in a pickle; dtypes of PyTorch and safetensors."""

import collections
import dataclasses
import math
import pickle
from typing import Any

import ml_dtypes
import numpy as np

# (NumPy and torch name, torch's storage class, safetensors code). Without a storage class,
# tensors are rebuilt by _rebuild_tensor_v3 only.
_DTYPE_ROWS = (
  ("float64", "DoubleStorage", "F64"),
  ("float32", "FloatStorage", "F32"),
  ("float16", "HalfStorage", "F16"),
  ("bfloat16", "BFloat16Storage", "BF16"),
  ("int64", "LongStorage", "I64"),
  ("int32", "IntStorage", "I32"),
  ("int16", "ShortStorage", "I16"),
  ("int8", "CharStorage", "I8"),
  ("uint8", "ByteStorage", "U8"),
  ("bool", "BoolStorage", "BOOL"),
  ("complex64", "ComplexFloatStorage", "C64"),
  ("complex128", "ComplexDoubleStorage", ""),
  ("uint64", "", "U64"),
  ("uint32", "", "U32"),
  ("uint16", "", "U16"),
  ("float8_e4m3fn", "", "F8_E4M3"),
  ("float8_e5m2", "", "F8_E5M2"),
)


def _dtype(name: str) -> np.dtype:
  return np.dtype(getattr(ml_dtypes, name, name))


TORCH_DTYPES = {name: _dtype(name) for name, _, _ in _DTYPE_ROWS}


STORAGES = {storage: _dtype(name) for name, storage, _ in _DTYPE_ROWS if storage}


SAFETENSORS = {code: _dtype(name) for name, _, code in _DTYPE_ROWS if code}


class Fixed:
  """An object that a pickle cannot change: the BUILD instruction would set attributes."""

  def __setstate__(self, state: Any) -> None:
    raise pickle.UnpicklingError(f"the pickle tries to change a {type(self).__name__}")


class StateDict(dict):
  """Replaces collections.OrderedDict; drops attributes (`_metadata`) that could shadow methods."""

  __slots__ = ()

  def __setstate__(self, state: Any) -> None:
    pass


class Placeholder:
  """Replaces an object of an unknown class or function; keeps its state."""

  __slots__ = ("state",)
  qualified_name = ""
  counts: collections.Counter

  def __new__(cls, *unused_args: Any, **unused_kwargs: Any) -> "Placeholder":
    """Counts the object."""
    self = super().__new__(cls)
    self.state = None
    cls.counts[cls.qualified_name] += 1
    return self

  def __setstate__(self, state: Any) -> None:
    self.state = state

  def __call__(self, *unused_args: Any, **unused_kwargs: Any) -> "Placeholder":
    """Returns itself, as the result of the unknown function."""
    return self

  def __setitem__(self, key: Any, value: Any) -> None:
    pass

  def append(self, item: Any) -> None:
    """Ignores the item."""

  def extend(self, items: Any) -> None:
    """Ignores the items."""


@dataclasses.dataclass(frozen=True)
class Broken(Fixed):
  """A tensor that cannot be rebuilt, with the reason; an error only if it is read."""

  reason: str


@dataclasses.dataclass(frozen=True)
class StorageType(Fixed):
  """A storage class."""

  dtype: np.dtype | None  # None: untyped, counted in bytes


@dataclasses.dataclass(frozen=True)
class DType(Fixed):
  """A dtype; the NumPy object itself has a __setstate__ that changes it for the whole process."""

  dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Storage(Fixed):
  """A record of the archive: its key, dtype and number of elements; None and bytes if untyped."""

  key: str
  dtype: np.dtype | None
  numel: int

  @property
  def nbytes(self) -> int:
    """Size in bytes."""
    return self.numel * (self.dtype.itemsize if self.dtype else 1)


@dataclasses.dataclass(frozen=True)
class TensorRef(Fixed):
  """A view of a storage: offset and strides in elements of `dtype`."""

  storage: Storage
  dtype: np.dtype
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  @property
  def span(self) -> int:
    """Number of elements from the first one of the view to its last one."""
    return (
      1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides)) if math.prod(self.shape) else 0
    )

  @property
  def contiguous(self) -> bool:
    """Returns whether the elements are stored in the order of the shape."""
    expected = 1
    for n, stride in zip(reversed(self.shape), reversed(self.strides)):
      if n != 1 and stride != expected:
        return False
      expected *= n
    return True


def describe(value: Any) -> str:
  """Describes a value of an unpickled file, without its contents, which may be huge."""
  if isinstance(value, Placeholder):
    return f"an object of {value.qualified_name}"
  if isinstance(value, type) and issubclass(value, Placeholder):
    return f"the name {value.qualified_name}"
  if isinstance(value, (TensorRef, Broken)):
    return "a tensor"
  if isinstance(value, dict):
    entries = [f"{name_of(key)[:60]!r}: {type_name(x)}" for key, x in list(value.items())[:8]]
    more = f", and {len(value) - 8} more" if len(value) > 8 else ""
    return f"a dictionary with {', '.join(entries)}{more}" if value else "an empty dictionary"
  return f"a {type_name(value)}"


def name_of(key: Any) -> str:
  """Returns a dictionary's key as text, or only its type if it is not a string."""
  return key if isinstance(key, str) else f"<{type_name(key)}>"


def type_name(value: Any) -> str:
  """Returns the type of a value of an unpickled file, with its name in the file."""
  if isinstance(value, Placeholder):
    return value.qualified_name
  return {TensorRef: "tensor", Broken: "tensor", StateDict: "dict"}.get(
    type(value), type(value).__name__
  )


def possible_shape(
  shape: tuple[int, ...] | list[int], itemsize: int, max_bytes: int = 1 << 62
) -> bool:
  """Returns whether NumPy can make an array of this shape with at most `max_bytes`."""
  # NumPy counts an empty dimension as one.
  return len(shape) <= 64 and math.prod(max(n, 1) for n in shape) * itemsize <= max_bytes
