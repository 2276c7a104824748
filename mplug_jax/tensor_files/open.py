"""PyTorch checkpoints as lazy mappings of numpy arrays: safetensors, torch.save, TorchScript and DeepSpeed, told by content.

No file is believed: nothing in it is run (torch_pickle.py), every length is checked against the file before it is used,
and what cannot be read is one sentence. PyTorch itself is needed for files from before PyTorch 1.6 alone.
"""

import contextlib
import functools
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from mplug_jax.tensor_files import torch_unpickler
from mplug_jax.tensor_files.torch_unpickler import Broken, Placeholder, TensorRef

_CHUNK = 1 << 24
_MAX_HEADER = 100_000_000  # of safetensors, the format's own limit
_MAX_PICKLE = 1 << 29  # of data.pkl, unpacked: the largest models have a few MB

LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
# First bytes -> what people download instead of a checkpoint.
_OTHERS = (
  (
    b"version https://git-lfs",
    "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
  ),
  (b"<", "a web page or XML; the download was not the file"),
  (b"\x89PNG", "a PNG image"),
  (b"\xff\xd8\xff", "a JPEG image"),
  (b"\x1f\x8b", "gzip; unpack it first"),
  (b"\x89HDF", "HDF5; convert it to safetensors first"),
  (b"\x80", "a pickle that torch.save did not write; save it again with torch.save"),
)


class _Entry(NamedTuple):
  shape: tuple[int, ...]
  dtype: np.dtype
  load: Callable[[], np.ndarray]


class TensorFile(Mapping):
  """A checkpoint on disk: name -> array, read when asked for, in the file's order. Not for several threads at once.

  Attributes:
    path: the file or folder.
    wrapper: where in the checkpoint the tensors were: "model", "module", "model/module", ..., or "" for the top level.
    placeholders: {qualified name of a class or function that was not run: how many objects}.
    ignored: {key: type} of the values beside the tensors.
    metadata: {name: text} of a safetensors file.
  """

  def __init__(
    self,
    path,
    entries,
    close=lambda: None,
    wrapper="",
    placeholders=None,
    ignored=None,
    metadata=None,
  ):
    self.path, self.wrapper = path, wrapper
    self.placeholders, self.ignored, self.metadata = (
      placeholders or {},
      ignored or {},
      metadata or {},
    )
    self._entries = entries
    self._close = close

  def __getitem__(self, name: str) -> np.ndarray:
    """Reads one tensor into memory of its own. Raises KeyError; ValueError if the file ends inside it."""
    return self._entries[name].load()

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)

  def __contains__(self, name) -> bool:  # Mapping's own would read the tensor
    return name in self._entries

  def shape(self, name: str) -> tuple[int, ...]:
    return self._entries[name].shape

  def dtype(self, name: str) -> np.dtype:
    """numpy's dtype; ml_dtypes.bfloat16 for bfloat16."""
    return self._entries[name].dtype

  def close(self) -> None:
    self._close()

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()


def open_tensors(path: str | os.PathLike) -> TensorFile:
  """Opens a checkpoint for reading.

  Args:
    path: a safetensors file, a file by torch.save or torch.jit.save, or a folder with model.safetensors, pytorch_model.bin
      (either in shards with an index) or DeepSpeed's mp_rank_00_model_states.pt. The suffix does not matter.

  Returns:
    A TensorFile. A file from before PyTorch 1.6 is read into memory as a whole, all others tensor by tensor.

  Raises:
    FileNotFoundError: no such file, or none of the above in the folder.
    ValueError: not a checkpoint, damaged, or without tensors.
    ImportError: a file from before PyTorch 1.6, and PyTorch is not installed.
  """
  path = os.fspath(path)
  if os.path.isdir(path):
    return _open_folder(path)
  if not os.path.exists(path):
    raise FileNotFoundError(f"{path}: no such file or folder.")
  with open(path, "rb") as file:
    head = file.read(64)
  if head.startswith(b"PK\x03\x04"):
    return _open_archive(path)
  if head.startswith(LEGACY_MAGIC):
    return _open_legacy(path)
  if head[8:9] == b"{":
    return _open_safetensors(path)
  found = next(
    (what for magic, what in _OTHERS if head.lstrip().startswith(magic)),
    "" if head else "an empty file; get it again",
  )
  raise ValueError(
    f"{path}: not a PyTorch checkpoint (safetensors or torch.save){': it is ' + found if found else ''}."
  )


def _read(file, offset, count, dtype, where):
  """`count` elements at a byte offset -> array [count] in memory of its own."""
  array = np.empty(count, dtype)
  view = memoryview(array.view(np.uint8))
  file.seek(offset)
  done = 0
  while done < len(view):
    got = file.readinto(view[done : done + _CHUNK])
    if not got:
      raise ValueError(f"{where}: the file ends inside this tensor; get it again.")
    done += got
  return array


# Folders.

_CHOICES = (
  "model.safetensors",
  "model.safetensors.index.json",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
)
_DEEPSPEED = "mp_rank_{:02d}_model_states.pt"


def _open_folder(path):
  choices = [*_CHOICES, _DEEPSPEED.format(0)]
  with (
    contextlib.suppress(OSError),
    open(os.path.join(path, "latest"), encoding="utf-8", errors="replace") as file,
  ):
    # DeepSpeed names its newest save here; only a folder beside it is believed.
    if (tag := file.read(256).strip()) and os.path.basename(tag) == tag and tag not in (".", ".."):
      choices.append(os.path.join(tag, _DEEPSPEED.format(0)))
  found = [name for name in choices if os.path.exists(os.path.join(path, name))]
  if len(found) != 1:
    rest = (
      f"it has {' and '.join(found)}; name one of them."
      if found
      else f"it has none of {', '.join(choices)}."
    )
    raise (ValueError if found else FileNotFoundError)(
      f"{path}: a folder should have one checkpoint, {rest}"
    )
  file = os.path.join(path, found[0])
  if file.endswith(".json"):
    return _open_shards(path, file)
  if file.endswith(_DEEPSPEED.format(0)) and os.path.exists(
    os.path.join(os.path.dirname(file), _DEEPSPEED.format(1))
  ):
    raise ValueError(
      f"{file}: the model is split over several mp_rank files; save it with tensor parallel size 1."
    )
  return open_tensors(file)


def _open_shards(path, index):
  """The files that an index names, as one: tensors file by file."""
  try:
    with open(index, encoding="utf-8") as file:
      weight_map = json.load(file)["weight_map"]
    shards = sorted(set(weight_map.values()))
    if not all(name and os.path.basename(name) == name for name in shards):
      raise ValueError("shards outside the folder")
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    raise ValueError(
      f"{index}: not an index of shards ({type(error).__name__}: {error})."
    ) from error
  entries, parts = {}, []
  with contextlib.ExitStack() as stack:
    for shard in shards:
      parts.append(part := stack.enter_context(open_tensors(os.path.join(path, shard))))
      differ = sorted(set(part) ^ {name for name, where in weight_map.items() if where == shard})
      if differ:
        raise ValueError(
          f"{part.path}: {os.path.basename(index)} lists other tensors than it has: {', '.join(differ[:5])} "
          f"({len(differ)} differ)."
        )
      entries.update(part._entries)
    return TensorFile(
      path,
      entries,
      stack.pop_all().close,
      placeholders=_merged(parts, "placeholders"),
      ignored=_merged(parts, "ignored"),
      metadata=_merged(parts, "metadata"),
    )


def _merged(parts, attribute):
  return {key: value for part in parts for key, value in getattr(part, attribute).items()}


# safetensors: 8 bytes length of the header, the header as JSON, the tensors without gaps.


def _open_safetensors(path):
  with contextlib.ExitStack() as stack:
    file = stack.enter_context(open(path, "rb"))
    size = os.path.getsize(path)
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, _MAX_HEADER):
      raise ValueError(
        f"{path}: damaged safetensors file: its header should have {length} bytes, the file has {size}; get it again."
      )
    try:
      header = json.loads(file.read(length), object_pairs_hook=_unique)
      metadata = header.pop("__metadata__", {})
      if not isinstance(metadata, dict):
        raise ValueError("__metadata__ is no object")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
      raise ValueError(
        f"{path}: damaged safetensors file: its header cannot be read ({error}); get it again."
      ) from error
    ranges = {
      name: _safetensors_range(f"{path}: tensor {name!r}", entry) for name, entry in header.items()
    }
    _check_ranges(path, ranges, size - 8 - length)
    ranges = dict(sorted(ranges.items(), key=lambda item: item[1][2]))
    entries = {
      name: _Entry(
        shape,
        dtype,
        functools.partial(
          _load_safetensors, file, 8 + length + begin, shape, dtype, f"{path}: tensor {name!r}"
        ),
      )
      for name, (shape, dtype, begin, _) in ranges.items()
    }
    return TensorFile(path, entries, stack.pop_all().close, metadata=metadata)


def _unique(pairs):
  values = dict(pairs)
  if len(values) < len(pairs):
    raise ValueError("a name occurs twice")
  return values


def _safetensors_range(where, entry):
  """One entry of the header -> (shape, dtype, first byte, byte after the last)."""
  try:
    shape, (begin, end), code = tuple(entry["shape"]), entry["data_offsets"], entry["dtype"]
    if not all(
      type(n) is int and n >= 0 for n in (*shape, begin, end)
    ) or not torch_unpickler.possible_shape(shape, 8):
      raise ValueError
  except (TypeError, KeyError, ValueError) as error:
    raise ValueError(
      f"{where}: damaged safetensors file: its header entry has no valid shape, dtype and data_offsets."
    ) from error
  if not isinstance(code, str) or code not in torch_unpickler.SAFETENSORS:
    raise ValueError(
      f"{where}: dtype {code!r} is not supported, only {', '.join(torch_unpickler.SAFETENSORS)}."
    )
  dtype = torch_unpickler.SAFETENSORS[code]
  if end - begin != math.prod(shape) * dtype.itemsize:
    raise ValueError(
      f"{where}: damaged safetensors file: {end - begin} bytes for shape {shape} of {dtype}."
    )
  return shape, dtype, begin, end


def _check_ranges(path, ranges, size):
  """The tensors must fill the file, each byte belonging to one."""
  at = 0
  for name, (_, _, begin, end) in sorted(ranges.items(), key=lambda item: item[1][2:]):
    if begin != at or end > size:
      problem = (
        "ends beyond the file"
        if end > size
        else "overlaps another tensor"
        if begin < at
        else "has a gap before it"
      )
      raise ValueError(
        f"{path}: tensor {name!r}: damaged safetensors file: it has bytes {begin} to {end} of {size}, it {problem}; "
        "get it again."
      )
    at = end
  if at != size:
    raise ValueError(
      f"{path}: damaged safetensors file: {size - at} bytes belong to no tensor; get it again."
    )


def _load_safetensors(file, offset, shape, dtype, where):
  return _read(file, offset, math.prod(shape), dtype, where).reshape(shape)


# torch.save and torch.jit.save: a zip archive of a pickle and one record for each storage.


class Archive:
  """The zip archive: records under one folder, stored ones read by their place in the file."""

  def __init__(self, path, file):
    self.path, self.file, self.size = path, file, os.path.getsize(path)
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
        f"{path}: a zip archive that is cut short or damaged ({error}); get the file again."
      ) from error
    roots = [
      name[: -len("data.pkl")]
      for name in self.zip.namelist()
      if name.count("/") == 1 and name.endswith("/data.pkl")
    ]
    if len(roots) != 1:
      raise ValueError(
        f"{path}: a zip archive with {len(roots) or 'no'} data.pkl, so not one that torch.save wrote; "
        "if it has checkpoints inside, unpack it."
      )
    self.root = roots[0]

  def info(self, name, where):
    """The entry of a record. Raises ValueError."""
    try:
      info = self.zip.getinfo(self.root + name)
    except KeyError:
      raise ValueError(
        f"{where}: record {self.root}{name} is missing; the file is damaged."
      ) from None
    if (
      info.header_offset < 0
      or info.header_offset + info.compress_size > self.size
      or (info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size)
    ):
      raise ValueError(
        f"{where}: record {info.filename} does not lie inside the file, which is damaged."
      )
    if info.flag_bits & 1:
      raise ValueError(
        f"{where}: record {info.filename} is encrypted; unpack it and save it without a password."
      )
    return info

  def read(self, name, offset, count, dtype, where):
    """`count` elements at a byte offset of a record -> array [count]."""
    info = self.info(name, where)
    if info.compress_type == zipfile.ZIP_STORED:
      # Not through zipfile: it reads from the start, and checks a checksum that PyTorch may leave out.
      return _read(self.file, self._start(info) + offset, count, dtype, where)
    try:
      with self.zip.open(info) as file:
        return _read(file, offset, count, dtype, where)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
      raise ValueError(
        f"{where}: record {info.filename} cannot be unpacked ({error}); get the file again."
      ) from error

  def _start(self, info):
    """Offset of a record's first byte: its name and padding stand between the local header and it."""
    self.file.seek(info.header_offset)
    header = self.file.read(30)
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
      raise ValueError(
        f"{self.path}: record {info.filename} is not where the archive says; the file is damaged."
      )
    name, extra = struct.unpack("<HH", header[26:])
    return info.header_offset + 30 + name + extra

  def whole(self, name):
    """All bytes of a small record."""
    info = self.info(name, self.path)
    if info.file_size > _MAX_PICKLE:
      raise ValueError(
        f"{self.path}: record {info.filename} has {info.file_size} bytes; no checkpoint has that much."
      )
    return self.read(
      name, 0, info.file_size, np.uint8, f"{self.path}: record {info.filename}"
    ).tobytes()

  def load(self, ref, where):
    """TensorRef -> array, in the order of its shape."""
    part = self.read(
      f"data/{ref.storage.key}", ref.offset * ref.dtype.itemsize, ref.span, ref.dtype, where
    )
    if ref.contiguous:
      return part.reshape(ref.shape)
    return np.lib.stride_tricks.as_strided(
      part, ref.shape, [s * ref.dtype.itemsize for s in ref.strides]
    ).copy(order="C")


def _open_archive(path):
  with contextlib.ExitStack() as stack:
    archive = Archive(path, stack.enter_context(open(path, "rb")))
    if (
      archive.root + "byteorder" in archive.zip.namelist()
      and (order := archive.whole("byteorder")) != b"little"
    ):
      raise ValueError(
        f"{path}: byte order {order[:20]!r} is not supported; save it on a little-endian machine."
      )
    root, placeholders = torch_unpickler.load(archive.whole("data.pkl"), path)
    wrapper, values = _state_dict(path, root, lambda x: isinstance(x, (TensorRef, Broken)))
    entries, ignored = {}, {}
    for key, value in values.items():
      if isinstance(value, (TensorRef, Broken)) and isinstance(key, str):
        entries[key] = _archive_entry(archive, value, f"{path}: tensor {key!r}")
      else:
        ignored[torch_unpickler.name_of(key)] = torch_unpickler.type_name(value)
    return TensorFile(path, entries, stack.pop_all().close, wrapper, placeholders, ignored)


def _state_dict(path, root, is_tensor):
  """-> (wrapper, {name: value}). Raises ValueError for a checkpoint without tensors."""
  values = torch_unpickler.flatten_modules(root, path) if isinstance(root, Placeholder) else root
  found = torch_unpickler.find_state_dict(values, is_tensor)
  if found is None:
    raise ValueError(
      f"{path}: no state dict in it: it holds {torch_unpickler.describe(root)}; save model.state_dict() instead."
    )
  return "/".join(found[0]), found[1]


def _archive_entry(archive, ref, where):
  if isinstance(ref, Broken):
    raise ValueError(f"{where} cannot be read: {ref.reason}.")
  nbytes = ref.storage.nbytes
  size = archive.info(f"data/{ref.storage.key}", where).file_size if nbytes else 0
  if size != nbytes:
    raise ValueError(
      f"{where}: its record has {size} bytes and should have {nbytes}; the file is damaged."
    )
  return _Entry(ref.shape, ref.dtype, functools.partial(archive.load, ref, where))


# torch.save before PyTorch 1.6: pickles and storages one after the other.


def _open_legacy(path):
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f"{path}: a file from before PyTorch 1.6, which takes PyTorch to read: pip install 'mplug_jax[convert]'"
    ) from error
  try:
    root = torch.load(path, weights_only=True, map_location="cpu")
  except Exception as error:  # a damaged file fails in any way
    raise ValueError(
      f"{path}: a file from before PyTorch 1.6 that PyTorch does not load as weights alone ({error})."
    ) from error
  wrapper, values = _state_dict(path, root, torch.is_tensor)
  entries, ignored = {}, {}
  for key, value in values.items():
    if not torch.is_tensor(value) or not isinstance(key, str):
      ignored[torch_unpickler.name_of(key)] = torch_unpickler.type_name(value)
      continue
    dtype = torch_unpickler.TORCH_DTYPES.get(str(value.dtype).removeprefix("torch."))
    if dtype is None or value.layout != torch.strided:
      raise ValueError(
        f"{path}: tensor {key!r} cannot be read: {value.dtype}, {value.layout} is not supported."
      )
    entries[key] = _Entry(tuple(value.shape), dtype, functools.partial(_from_torch, value, dtype))
  return TensorFile(path, entries, wrapper=wrapper, ignored=ignored)


def _from_torch(tensor, dtype):
  # As bytes: numpy has no bfloat16 that PyTorch knows of.
  import torch

  flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().copy()
  return flat.view(dtype).reshape(tuple(tensor.shape))
