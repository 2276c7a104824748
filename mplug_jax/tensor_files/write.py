"""Atomic writers of safetensors and torch.save files, one tensor at a time and without PyTorch."""

import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, NamedTuple, cast

import numpy as np

from mplug_jax.runtime.atomic_files import open_atomic
from mplug_jax.tensor_files.torch_types import SAFETENSORS, STORAGES


class Tensor(NamedTuple):
  """A tensor to be written; its shape and dtype are known before it is made.

  Attributes:
    name: its key.
    shape: of the array.
    dtype: of the array; bfloat16 is ml_dtypes.bfloat16.
    load: makes the array, called when the tensor is written.
    same_as: name of an earlier tensor of equal shape and dtype whose bytes this one shares (tied
      weights); `load` is not called.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  load: Callable[[], np.ndarray] | None = None
  same_as: str = ""

  def make(self) -> np.ndarray:
    """Returns the array."""
    if self.load is None:
      raise ValueError(
        f"The tensor {self.name!r} has no values; it shares those of another tensor."
      )
    return self.load()


Tensors = Mapping[str, np.ndarray] | Iterable[Tensor]


def _checked(
  path: str | os.PathLike, tensors: Tensors, dtypes: Mapping[np.dtype, str]
) -> dict[str, Tensor]:
  """Returns the writers' arguments as {name: Tensor}; raises ValueError for an invalid one."""
  items = cast(Iterable[Tensor], tensors)
  if isinstance(tensors, Mapping):
    items = [
      Tensor(name, array.shape, array.dtype, lambda array=array: array)
      for name, array in cast(Mapping[str, np.ndarray], tensors).items()
    ]
  checked = {}
  for item in items:
    tensor = item._replace(shape=tuple(map(int, item.shape)), dtype=np.dtype(item.dtype))
    label = f"{path}: tensor {tensor.name!r}"
    if tensor.name in checked:
      raise ValueError(f"{label} is given twice.")
    if tensor.dtype not in dtypes:
      raise ValueError(
        f"{label}: dtype {tensor.dtype} cannot be stored, only {', '.join(map(str, dtypes))}."
      )
    if tensor.same_as:
      other = checked.get(tensor.same_as)
      if (
        other is None or other.same_as or (other.shape, other.dtype) != (tensor.shape, tensor.dtype)
      ):
        raise ValueError(
          f"{label} shares {tensor.same_as!r}, which is no earlier tensor with values and "
          "with this shape and dtype."
        )
    checked[tensor.name] = tensor
  return checked


def _nbytes(tensor: Tensor) -> int:
  return math.prod(tensor.shape) * tensor.dtype.itemsize


def _write(file: IO[bytes], path: str | os.PathLike, tensor: Tensor) -> None:
  """Makes one tensor and writes its bytes."""
  array = tensor.make()
  if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):
    raise ValueError(
      f"{path}: tensor {tensor.name!r} was announced as {tensor.dtype}{list(tensor.shape)} "
      f"and is {array.dtype}{list(array.shape)}."
    )
  file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def save_safetensors(
  path: str | os.PathLike, tensors: Tensors, metadata: Mapping[str, str] | None = None
) -> None:
  """Writes a safetensors file, one tensor in memory at a time.

  Args:
    path: replaced only once the new file is complete.
    tensors: {name: array}, or `Tensor`s. They are stored by decreasing element size, else in the
      given order. The format shares no bytes: a tensor with `same_as` is made and stored again.
    metadata: texts for the header.

  Raises:
    ValueError: an unsupported dtype, a duplicate name, an array that differs from its declared
      shape or dtype, or metadata that is no text.
    OSError: the file could not be written; nothing of it remains.
  """
  checked = _checked(path, tensors, {dtype: code for code, dtype in SAFETENSORS.items()})
  if (
    not all(isinstance(text, str) for item in (metadata or {}).items() for text in item)
    or "__metadata__" in checked
  ):
    raise ValueError(
      f"{path}: safetensors metadata must be texts, and no tensor may have the name __metadata__."
    )
  # Every tensor then starts at a multiple of its element size, which some readers need.
  ordered = sorted(checked.values(), key=lambda tensor: -tensor.dtype.itemsize)
  header = _safetensors_header(ordered, metadata)
  with open_atomic(path) as file:
    file.write(struct.pack("<Q", len(header)) + header)
    for tensor in ordered:
      _write(
        file, path, checked[tensor.same_as]._replace(name=tensor.name) if tensor.same_as else tensor
      )


def _safetensors_header(tensors: Iterable[Tensor], metadata: Mapping[str, str] | None) -> bytes:
  codes = {dtype: code for code, dtype in SAFETENSORS.items()}
  header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
  at = 0
  for tensor in tensors:
    end = at + _nbytes(tensor)
    header[tensor.name] = {
      "dtype": codes[tensor.dtype],
      "shape": tensor.shape,
      "data_offsets": [at, end],
    }
    at = end
  text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
  return text + b" " * (-len(text) % 8)


def save_pth(path: str | os.PathLike, tensors: Tensors, wrapper: str = "model") -> None:
  """Writes the file of `torch.save({wrapper: OrderedDict(tensors)}, path)`.

  One tensor at a time is in memory. `torch.load` reads it with weights_only and mmap.

  Args:
    path: replaced only once the new file is complete.
    tensors: {name: array}, or `Tensor`s; one with `same_as` shares the other's storage, as tied
      weights do.
    wrapper: "" for a plain state dict.

  Raises:
    ValueError: a dtype without a PyTorch storage class, a duplicate name, or an array that differs
      from its declared shape or dtype.
    OSError: the file could not be written; nothing of it remains.
  """
  checked = _checked(path, tensors, {dtype: name for name, dtype in STORAGES.items()})
  stored = [tensor for tensor in checked.values() if not tensor.same_as]
  keys = {tensor.name: str(i) for i, tensor in enumerate(stored)}
  with open_atomic(path) as file, zipfile.ZipFile(file, "w") as archive:
    _add(archive, file, "data.pkl", _pickled(checked.values(), keys, wrapper))
    _add(archive, file, "byteorder", b"little")
    for tensor in stored:
      with _record(archive, file, f"data/{keys[tensor.name]}", _nbytes(tensor)) as record:
        _write(record, path, tensor)
    _add(archive, file, "version", b"3\n")


_ALIGNMENT = 64  # of every record, as torch.save does for mmap
_PADDING = 0x4246  # id of the extra field that torch.save pads with


def _record(archive: zipfile.ZipFile, file: IO[bytes], name: str, nbytes: int) -> IO[bytes]:
  """Opens a new record for writing; its first byte is at a multiple of _ALIGNMENT."""
  info = zipfile.ZipInfo(f"archive/{name}")
  large = nbytes > zipfile.ZIP64_LIMIT
  # Local header: 30 bytes, the name, large-format sizes (20 bytes), padding (4 bytes + `pad`).
  pad = -(file.tell() + 30 + len(info.filename) + (20 if large else 0) + 4) % _ALIGNMENT
  info.extra = struct.pack("<HH", _PADDING, pad) + b"Z" * pad
  return archive.open(info, "w", force_zip64=large)


def _add(archive: zipfile.ZipFile, file: IO[bytes], name: str, data: bytes) -> None:
  with _record(archive, file, name, len(data)) as record:
    record.write(data)


# The pickle is written by instruction: Python's pickler would have to import the PyTorch names.


def _pickled(tensors: Iterable[Tensor], keys: Mapping[str, str], wrapper: str) -> bytes:
  items = (_text(x.name) + _rebuilt(x, keys[x.same_as or x.name]) for x in tensors)
  state = _ordered_dict() + pickle.MARK + b"".join(items) + pickle.SETITEMS
  if wrapper:
    state = pickle.EMPTY_DICT + _text(wrapper) + state + pickle.SETITEM
  return pickle.PROTO + b"\x02" + state + pickle.STOP


def _rebuilt(tensor: Tensor, key: str) -> bytes:
  """Pickles a call of _rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)."""
  storage = next(name for name, dtype in STORAGES.items() if dtype == tensor.dtype)
  numel = math.prod(tensor.shape)
  # Strides as PyTorch has them: an empty dimension counts as one.
  strides = [math.prod(max(n, 1) for n in tensor.shape[i + 1 :]) for i in range(len(tensor.shape))]
  reference = (
    _tuple(_text("storage"), _name("torch", storage), _text(key), _text("cpu"), _int(numel))
    + pickle.BINPERSID
  )
  sizes = _tuple(*map(_int, tensor.shape)), _tuple(*map(_int, strides))
  args = _tuple(reference, _int(0), *sizes, pickle.NEWFALSE, _ordered_dict())
  return _name("torch._utils", "_rebuild_tensor_v2") + args + pickle.REDUCE


def _ordered_dict() -> bytes:
  return _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE


def _name(module: str, name: str) -> bytes:
  return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
  data = text.encode()
  return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _int(n: int) -> bytes:
  if n < 1 << 31:
    return pickle.BININT + struct.pack("<i", n)
  data = pickle.encode_long(n)
  return pickle.LONG1 + bytes([len(data)]) + data


def _tuple(*items: bytes) -> bytes:
  return pickle.MARK + b"".join(items) + pickle.TUPLE
