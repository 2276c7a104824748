"""Reads PyTorch's zip archives without PyTorch, and its legacy files with it."""

import contextlib
import functools
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from mplug_jax.tensor_files import torch_types, torch_unpickler
from mplug_jax.tensor_files.tensor_file import Entry, TensorFile, read_chunked
from mplug_jax.tensor_files.torch_types import Broken, Placeholder, TensorRef

_MAX_PICKLE = 1 << 29  # of data.pkl, unpacked: the largest models have a few MB


LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."


# torch.save and torch.jit.save: a zip archive of a pickle and one record for each storage.


class Archive:
  """The zip archive: records in one folder; uncompressed ones are read by their file offset."""

  def __init__(self, path: str, file: IO[bytes]) -> None:
    self.path = path
    self.file = file
    self.size = os.path.getsize(path)
    try:
      self.zip = zipfile.ZipFile(file)
    except (
      zipfile.BadZipFile,
      ValueError,
      NotImplementedError,
      struct.error,
      OverflowError,
      OSError,
    ) as error:
      raise ValueError(
        f"{path}: a truncated or damaged zip archive ({error}); get the file again."
      ) from error
    roots = [
      name[: -len("data.pkl")]
      for name in self.zip.namelist()
      if name.count("/") == 1 and name.endswith("/data.pkl")
    ]
    if len(roots) != 1:
      raise ValueError(
        f"{path}: a zip archive with {len(roots) or 'no'} data.pkl, so not one that torch.save "
        "wrote; if it has checkpoints inside, unpack it."
      )
    self.root = roots[0]

  def info(self, name: str, label: str) -> zipfile.ZipInfo:
    """Returns the entry of a record; raises ValueError, with `label`, if it is damaged."""
    try:
      info = self.zip.getinfo(self.root + name)
    except KeyError:
      raise ValueError(
        f"{label}: record {self.root}{name} is missing; the file is damaged."
      ) from None
    if (
      info.header_offset < 0
      or info.header_offset + info.compress_size > self.size
      or (info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size)
    ):
      raise ValueError(
        f"{label}: record {info.filename} is not inside the file; the file is damaged."
      )
    if info.flag_bits & 1:
      raise ValueError(
        f"{label}: record {info.filename} is encrypted; unpack it and save it without a password."
      )
    return info

  def read(self, name: str, offset: int, count: int, dtype: Any, label: str) -> np.ndarray:
    """Reads `count` elements at a byte offset of a record."""
    info = self.info(name, label)
    if info.compress_type == zipfile.ZIP_STORED:
      # zipfile reads from the start, and checks a checksum that PyTorch may leave out.
      return read_chunked(self.file, self._start(info) + offset, count, dtype, label)
    try:
      with self.zip.open(info) as file:
        return read_chunked(file, offset, count, dtype, label)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
      raise ValueError(
        f"{label}: record {info.filename} cannot be unpacked ({error}); get the file again."
      ) from error

  def _start(self, info: zipfile.ZipInfo) -> int:
    """Returns the offset of a record's first byte, after the local header, name and padding."""
    self.file.seek(info.header_offset)
    header = self.file.read(30)
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
      raise ValueError(
        f"{self.path}: record {info.filename} is not where the archive says; the file is damaged."
      )
    name, extra = struct.unpack("<HH", header[26:])
    return info.header_offset + 30 + name + extra

  def read_all(self, name: str) -> bytes:
    """Reads all bytes of a small record."""
    info = self.info(name, self.path)
    if info.file_size > _MAX_PICKLE:
      raise ValueError(
        f"{self.path}: record {info.filename} has {info.file_size} bytes; "
        "more than any checkpoint has."
      )
    return self.read(
      name, 0, info.file_size, np.uint8, f"{self.path}: record {info.filename}"
    ).tobytes()

  def load(self, ref: TensorRef, label: str) -> np.ndarray:
    """Reads a tensor into a contiguous array."""
    part = self.read(
      f"data/{ref.storage.key}", ref.offset * ref.dtype.itemsize, ref.span, ref.dtype, label
    )
    if ref.contiguous:
      return part.reshape(ref.shape)
    return np.lib.stride_tricks.as_strided(
      part, ref.shape, [s * ref.dtype.itemsize for s in ref.strides]
    ).copy(order="C")


def open_archive(path: str) -> TensorFile:
  """Opens a zip archive of torch.save or torch.jit.save."""
  with contextlib.ExitStack() as stack:
    archive = Archive(path, stack.enter_context(open(path, "rb")))
    if (
      archive.root + "byteorder" in archive.zip.namelist()
      and (order := archive.read_all("byteorder")) != b"little"
    ):
      raise ValueError(
        f"{path}: byte order {order[:20]!r} is not supported; save it on a little-endian machine."
      )
    root, placeholders = torch_unpickler.load(archive.read_all("data.pkl"), path)
    wrapper, values = _state_dict(path, root, lambda x: isinstance(x, (TensorRef, Broken)))
    entries = {}
    ignored = {}
    for key, value in values.items():
      if isinstance(value, (TensorRef, Broken)) and isinstance(key, str):
        entries[key] = _archive_entry(archive, value, f"{path}: tensor {key!r}")
      else:
        ignored[torch_types.name_of(key)] = torch_types.type_name(value)
    return TensorFile(path, entries, stack.pop_all().close, wrapper, placeholders, ignored)


def _state_dict(
  path: str, root: Any, is_tensor: Callable[[Any], bool]
) -> tuple[str, dict[Any, Any]]:
  """Returns (wrapper, {name: value}); raises ValueError for a checkpoint without tensors."""
  values = torch_unpickler.flatten_modules(root, path) if isinstance(root, Placeholder) else root
  result = torch_unpickler.find_state_dict(values, is_tensor)
  if result is None:
    raise ValueError(
      f"{path}: it has no state dict, but {torch_types.describe(root)}; "
      "save model.state_dict() instead."
    )
  wrapper, tensors = result
  return "/".join(wrapper), tensors


def _archive_entry(archive: Archive, ref: TensorRef | Broken, label: str) -> Entry:
  if isinstance(ref, Broken):
    raise ValueError(f"{label} cannot be read: {ref.reason}.")
  nbytes = ref.storage.nbytes
  size = archive.info(f"data/{ref.storage.key}", label).file_size if nbytes else 0
  if size != nbytes:
    raise ValueError(
      f"{label}: its record has {size} bytes and should have {nbytes}; the file is damaged."
    )
  return Entry(ref.shape, ref.dtype, functools.partial(archive.load, ref, label))


# torch.save before PyTorch 1.6: pickles and storages one after the other.


def open_legacy(path: str) -> TensorFile:
  """Loads a file of torch.save from before PyTorch 1.6 into memory, with PyTorch."""
  try:
    import torch  # pyright: ignore[reportMissingImports] # optional
  except ImportError as error:
    raise ImportError(
      f"{path}: a file from before PyTorch 1.6, which only PyTorch can read: "
      "pip install 'mplug_jax[convert]'"
    ) from error
  try:
    root = torch.load(path, weights_only=True, map_location="cpu")
  except Exception as error:  # a damaged file fails in any way
    raise ValueError(
      f"{path}: a file from before PyTorch 1.6 that PyTorch cannot load with weights_only=True "
      f"({error})."
    ) from error
  wrapper, values = _state_dict(path, root, torch.is_tensor)
  entries = {}
  ignored = {}
  for key, value in values.items():
    if not torch.is_tensor(value) or not isinstance(key, str):
      ignored[torch_types.name_of(key)] = torch_types.type_name(value)
      continue
    dtype = torch_types.TORCH_DTYPES.get(str(value.dtype).removeprefix("torch."))
    if dtype is None or value.layout != torch.strided:
      raise ValueError(
        f"{path}: tensor {key!r} cannot be read: {value.dtype}, {value.layout} is not supported."
      )
    entries[key] = Entry(tuple(value.shape), dtype, functools.partial(_from_torch, value, dtype))
  return TensorFile(path, entries, wrapper=wrapper, ignored=ignored)


def _from_torch(tensor: Any, dtype: np.dtype) -> np.ndarray:
  # As bytes, since PyTorch cannot convert to NumPy's bfloat16.
  import torch  # pyright: ignore[reportMissingImports] # optional

  flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().copy()
  return flat.view(dtype).reshape(tuple(tensor.shape))
