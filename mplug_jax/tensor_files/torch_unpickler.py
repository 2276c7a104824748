"""Unpickles torch.save and torch.jit.save files to tensor descriptions, without running any code.

A pickle is a program: it names functions and calls them. `load` maps the few names a state dict
needs (ordered dictionaries, storages, the functions that rebuild a tensor) to inert replacements;
every other name becomes a `Placeholder` class, which takes any arguments, state and items and does
nothing. No name in the file is ever imported.

Own code rather than torch.load: conversion works without PyTorch installed.
"""

import collections
import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mplug_jax.tensor_files.torch_types import (
  STORAGES,
  TORCH_DTYPES,
  Broken,
  DType,
  Fixed,
  Placeholder,
  StateDict,
  Storage,
  StorageType,
  TensorRef,
  describe,
  possible_shape,
)

# Deeper than any model, far below Python's recursion limit; a hostile archive may nest endlessly.
_MAX_DEPTH = 100


_MAX_NODES = 1_000_000


# Bytes that a view may have beyond its storage: a stride of 0 repeats elements endlessly.
_MAX_EXPANDED = 1 << 30


def _make(storage: Any, offset: Any, shape: Any, strides: Any, dtype: np.dtype | None) -> TensorRef:
  if isinstance(storage, Broken):
    raise ValueError(storage.reason)
  if not isinstance(storage, Storage):
    raise ValueError(f"it needs a storage and the file gives {describe(storage)}")
  if dtype is None:
    raise ValueError("its storage is untyped and no dtype is given")
  if not isinstance(shape, (tuple, list)) or not isinstance(strides, (tuple, list)):
    raise ValueError(f"its shape is {describe(shape)}, its strides are {describe(strides)}")
  numbers = (offset, *shape, *strides)
  if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
    raise ValueError("its offset, shape or strides are not whole numbers")
  if not possible_shape(shape, dtype.itemsize, max(_MAX_EXPANDED, storage.nbytes)):
    raise ValueError("its shape is far larger than its storage")
  ref = TensorRef(storage, dtype, offset, tuple(shape), tuple(strides))
  if (offset + ref.span) * dtype.itemsize > storage.nbytes:
    raise ValueError(f"it reaches beyond its storage of {storage.nbytes} bytes")
  return ref


def _tensor(
  storage: Any,
  offset: Any,
  shape: Any,
  strides: Any,
  _requires_grad: Any = False,
  _hooks: Any = None,
  views: Any = None,
) -> TensorRef:
  _check_views(views)
  return _make(storage, offset, shape, strides, getattr(storage, "dtype", None))


def _tensor_v3(
  storage: Any,
  offset: Any,
  shape: Any,
  strides: Any,
  _requires_grad: Any,
  _hooks: Any,
  dtype: Any,
  views: Any = None,
) -> TensorRef:
  _check_views(views)
  return _make(storage, offset, shape, strides, dtype.dtype if isinstance(dtype, DType) else None)


def _check_views(views: Any) -> None:
  """Raises ValueError for lazily negated or conjugated tensors, whose storage differs."""
  if views is not None and (
    not isinstance(views, dict) or any(value is not False for value in views.values())
  ):
    raise ValueError("it is a negated or conjugated view; save x.resolve_neg().resolve_conj()")


def _parameter(data: Any, *unused: Any) -> TensorRef | Broken:
  if not isinstance(data, (TensorRef, Broken)):
    raise ValueError(f"it needs a tensor and the file gives {describe(data)}")
  return data


def _from_type(function: Any, _type: Any, args: Any, *unused: Any) -> Any:
  """Rebuilds a tensor with attributes: function(*args), for functions of this module only."""
  if not isinstance(function, Function):
    raise ValueError(f"it is made by {describe(function)}")
  return function(*args)


def _unknown(*unused: Any) -> TensorRef:
  raise ValueError("quantized, sparse and other special tensors are not supported")


class Function(Fixed):
  """A function callable by a pickle; returns `Broken` for tensors that cannot be rebuilt."""

  def __init__(self, function: Callable[..., Any]) -> None:
    self._function = function

  def __call__(self, *args: Any) -> Any:
    """Calls the function; returns Broken if it raises."""
    try:
      return self._function(*args)
    except (TypeError, ValueError) as error:
      return Broken(str(error))


_NAMES = {
  "collections.OrderedDict": StateDict,
  "torch.Size": Function(lambda sizes=(): tuple(sizes)),
  "torch.device": Function(lambda *unused: "device"),  # not its text, which may be huge
  "torch._utils._rebuild_tensor": Function(_tensor),
  "torch._utils._rebuild_tensor_v2": Function(_tensor),
  "torch._utils._rebuild_tensor_v3": Function(_tensor_v3),
  "torch._utils._rebuild_parameter": Function(_parameter),
  "torch._utils._rebuild_parameter_with_state": Function(_parameter),
  "torch._tensor._rebuild_from_type_v2": Function(_from_type),
  "torch.UntypedStorage": StorageType(None),
  "torch.storage.UntypedStorage": StorageType(None),
  **{f"torch.{name}": StorageType(dtype) for name, dtype in STORAGES.items()},
  **{f"torch.cuda.{name}": StorageType(dtype) for name, dtype in STORAGES.items()},
  **{f"torch.{name}": DType(dtype) for name, dtype in TORCH_DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
  """Python's unpickler with its two hooks for outside objects closed."""

  def __init__(self, data: bytes, names: Mapping[str, Any]) -> None:
    # Byte strings of Python 2 decode as latin-1, whatever the bytes.
    super().__init__(io.BytesIO(data), encoding="latin-1")
    self._names = names
    self.counts = collections.Counter()
    self._placeholders = {}

  def find_class(self, module: str, name: str) -> Any:
    """Returns the inert replacement of a name."""
    full = ascii(f"{module}.{name}")[1:-1]  # it ends up in messages of one line
    if full in self._names:
      return self._names[full]
    self.counts[full] += 0  # mentioned
    if full.startswith("torch._utils._rebuild"):
      self.counts[full] += 1
      return Function(_unknown)
    if full not in self._placeholders:
      # Some instructions need a class, so each name gets one, made for this file only.
      self._placeholders[full] = type(
        "_Placeholder",
        (Placeholder,),
        {"__slots__": (), "qualified_name": full, "counts": self.counts},
      )
    return self._placeholders[full]

  def persistent_load(self, pid: Any) -> Storage | Broken:
    """Returns the storage of a persistent id."""
    if isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage":
      _, kind, key, _, numel = pid[:5]
      if (
        isinstance(kind, StorageType)
        and isinstance(key, str)
        and type(numel) is int
        and 0 <= numel < 1 << 62
      ):
        return Storage(key, kind.dtype, numel)
      return Broken(f"its storage is {describe(kind)}")
    return Broken("its storage has an unknown form")


_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}


def _check_memo(data: bytes) -> None:
  """Raises UnpicklingError for memo indices beyond the file position.

  Python's unpickler allocates a list as long as the largest index: up to 64 GiB for a damaged byte.
  """
  file = io.BytesIO(data)
  name = ""
  while name != "STOP":
    position = file.tell()
    opcode = _OPCODES.get(file.read(1).decode("latin-1"))
    if opcode is None:
      raise pickle.UnpicklingError(f"no instruction after {position} bytes")
    name = opcode.name
    if name == "STRING":  # a byte string of Python 2, a line of any bytes; pickletools needs ASCII
      file.readline()
      continue
    argument = opcode.arg.reader(file) if opcode.arg else None
    puts = name in ("PUT", "BINPUT", "LONG_BINPUT")
    if puts and argument is not None and argument > position:  # picklers count from 0
      raise pickle.UnpicklingError(f"memo index {argument} after {position} bytes")


def load(
  data: bytes, path: str, names: Mapping[str, Any] | None = None, kind: str = "checkpoint"
) -> tuple[object, dict[str, int]]:
  """Reads a pickle.

  Args:
    data: the pickle.
    path: its file, for the error.
    names: {qualified name: its replacement} besides those of PyTorch; replacements must not have
      side effects.
    kind: the expected kind of file, for the error.

  Returns:
    (the object: dicts, lists, numbers, `TensorRef`, `Placeholder`, ...; {name of an unknown class
    or function: number of objects it would have made, at least 1}).

  Raises:
    ValueError: it is not a pickle, is truncated, or does more than describe a state dict.
  """
  unpickler = _Unpickler(data, _NAMES | dict(names or {}))
  try:
    _check_memo(data)
    value = unpickler.load()
  except Exception as error:  # untrusted instructions can raise any exception
    problem = f"{type(error).__name__}: {error}".replace("\n", " ")
    raise ValueError(
      f"{path}: its pickle cannot be read ({problem}); the file is damaged or not a {kind}."
    ) from error
  return value, {name: max(count, 1) for name, count in unpickler.counts.items()}


# Where training scripts, DeepSpeed and Lightning keep the model's tensors.
_WRAPPERS = ("model", "module", "state_dict")


def find_state_dict(
  root: Any, is_tensor: Callable[[Any], bool], path: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], dict[Any, Any]] | None:
  """Finds the dictionary of tensors: "model", else "module", "state_dict", or the top level.

  Args:
    root: the unpickled checkpoint.
    is_tensor: value -> bool.
    path: keys that lead to `root`.

  Returns:
    (keys that lead to it, the dictionary), or None if there is none.
  """
  if not isinstance(root, dict) or len(path) > len(_WRAPPERS):
    return None
  for key in _WRAPPERS:
    if key in root and (result := find_state_dict(root[key], is_tensor, (*path, key))):
      return result
  return (path, root) if any(map(is_tensor, root.values())) else None


def flatten_modules(root: Placeholder, path: str) -> dict[str, Any]:
  """Flattens the module objects of a TorchScript archive to {"visual.conv1.weight": value}.

  Raises:
    ValueError: the tree contains itself.
  """
  flat = {}
  visited = 0
  stack = [("", root, 0)]
  while stack:
    name, value, depth = stack.pop()
    visited += 1
    if depth > _MAX_DEPTH or visited > _MAX_NODES:
      raise ValueError(f"{path}: its module objects contain themselves; the file is damaged.")
    if isinstance(value, Placeholder) and isinstance(value.state, dict):
      # Reversed, as the last one pushed is the next one visited: the attributes keep their order.
      stack += [
        (f"{name}.{key}" if name else key, x, depth + 1)
        for key, x in reversed(value.state.items())
        if isinstance(key, str)
      ]
    else:
      flat[name] = value
  return flat
