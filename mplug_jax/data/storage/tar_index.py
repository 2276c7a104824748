"""Indices of WebDataset tars, so that any image-text pair can be read alone.

The layout is that of img2dataset: the members of a pair are adjacent and named KEY.EXTENSION, where
KEY ends at the first dot of the file name. The image is the first with a suffix of IMAGE_SUFFIXES;
the text is that of .txt or, if there is none, "caption" of .json. A second member with the same
extension begins another pair. Whatever belongs to no pair is counted, and some of it is named.

Headers are read once; positions and sizes are cached under $XDG_CACHE_HOME (default: ~/.cache)
until the tar changes. A pair takes 29 bytes and its key.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mplug_jax.data.images.suffixes import IMAGE_SUFFIXES
from mplug_jax.data.storage import remote, tar_headers
from mplug_jax.runtime import atomic_files

# Offsets and sizes of the data in the tar; the end of the key in `keys`; whether the text is that
# of a .json.
PAIR = np.dtype(
  [
    ("image", "<u8"),
    ("text", "<u8"),
    ("image_size", "<u4"),
    ("text_size", "<u4"),
    ("key_end", "<u4"),
    ("is_json", "?"),
  ]
)
# Kinds of what is counted.
NO_IMAGE = "no image"
NO_TEXT = "no text"
REPEATED = "repeated"  # keys of several pairs
SEVERAL = "several images"  # keys with images of several formats
UNPAIRED = "unpaired image"  # images whose name has a further dot
IGNORED = "ignored"  # all other members, empty and hidden ones too

_VERSION = 2  # of the cached files
_IMAGES = frozenset(suffix[1:].encode() for suffix in IMAGE_SUFFIXES)
_USED = _IMAGES | {b"txt", b"json"}
_NAME = re.compile(rb"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)
_NAMED = 3  # keys and members of each kind that are kept
_BUFFERED = 4096  # pairs held as Python objects
_THREADS = 16


@dataclasses.dataclass
class TarIndex:
  """The pairs of one tar.

  Attributes:
    path: the tar.
    pairs: PAIR[N].
    keys: their keys, concatenated.
    skipped: {kind: number of keys or members}, see NO_IMAGE and so on.
    named: {kind: a few of them}.
    damage: "" or, if the tar cannot be read to its end, a sentence that says so; `pairs` are then
      those before the damage.
  """

  path: str
  pairs: np.ndarray
  keys: bytes
  skipped: dict[str, int]
  named: dict[str, list[str]]
  damage: str = ""

  def __len__(self) -> int:
    return len(self.pairs)

  def key(self, number: int) -> str:
    """Returns the key of a pair."""
    start = int(self.pairs["key_end"][number - 1]) if number else 0
    return self.keys[start : int(self.pairs["key_end"][number])].decode("utf-8", "replace")


def load(paths: Sequence[str]) -> list[TarIndex]:
  """Loads or makes the indices of several tars, in parallel.

  Args:
    paths: the tars, each once.

  Returns:
    Their indices, in the same order.

  Raises:
    FileNotFoundError: a file does not exist.
    ValueError: a file is compressed, or no tar at all.
    OSError: a file cannot be read.
  """
  with ThreadPoolExecutor(min(_THREADS, max(1, len(paths)))) as pool:
    return list(pool.map(_load, paths))


def _load(path: str) -> TarIndex:
  """Returns the cached index of a tar, or makes and caches it."""
  size, stamp = remote.state(path)
  cache = _cache_file(path)
  # The cached file is missing, belongs to another version of the tar, or is incomplete.
  with (
    contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile),
    np.load(cache, allow_pickle=False) as arrays,
  ):
    about = json.loads(arrays["about"].tobytes())
    if about.pop("stamp") == [_VERSION, stamp]:
      pairs = arrays["pairs"].astype(PAIR, copy=False)
      return TarIndex(path, pairs, arrays["keys"].tobytes(), **about)
  index = _make(path, size)
  with contextlib.suppress(OSError):  # without a writable cache it is made again each time
    _save(index, stamp, cache)
  return index


def _save(index: TarIndex, stamp: str, cache: str) -> None:
  """Writes the cached file of an index."""
  os.makedirs(os.path.dirname(cache), exist_ok=True)
  about = {
    "stamp": [_VERSION, stamp],
    "skipped": index.skipped,
    "named": index.named,
    "damage": index.damage,
  }
  with atomic_files.open_atomic(cache) as file:
    np.savez(
      file,
      pairs=index.pairs,
      keys=np.frombuffer(index.keys, np.uint8),
      about=np.frombuffer(json.dumps(about).encode(), np.uint8),
    )


def _cache_file(path: str) -> str:
  """Returns the path of the cached index of a tar."""
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  full_path = path if remote.is_remote(path) else os.path.abspath(path)
  name = hashlib.sha256(full_path.encode("utf-8", "surrogateescape")).hexdigest()[:32]
  return os.path.join(cache, "mplug_jax", "shards", f"{name}.npz")


def _make(path: str, size: int) -> TarIndex:
  """Makes the index of a tar of `size` bytes from its headers."""
  builder = _Builder(path)
  with remote.open_file(path) as file:
    if file.read(6).startswith(tar_headers.COMPRESSED):
      raise ValueError(
        f"{path} is a compressed tar, whose files cannot be reached without unpacking all before "
        "them: unpack it."
      )
    last = b""
    try:
      for member in tar_headers.members(file, size):
        if member.link is None:
          last = member.name
        builder.add(member)
    except tar_headers.DamageError as error:
      if not last:
        raise ValueError(f"{path} is not a tar file, or is cut off ({error}).") from None
      name = last.decode("utf-8", "replace")
      builder.index.damage = f"{path} {error}; its last good member is {name}."
  return builder.finish()


class _Builder:
  """Collects the pairs of one tar."""

  def __init__(self, path: str):
    self.index = TarIndex(path, np.zeros(0, PAIR), b"", {}, {})
    self._parts: list[np.ndarray] = []
    self._rows: list[tuple] = []
    self._keys = bytearray()
    self._group = _Group(b"")
    self._paired: set[bytes] = set()

  def add(self, member: tar_headers.Member) -> None:
    """Adds the next member of the tar."""
    match = _NAME.fullmatch(member.name)
    extension = match[2].lower() if match else b""
    if not match or not member.size or extension not in _USED:  # a hard link has no size
      unpaired = match and member.size and extension.rpartition(b".")[2] in _IMAGES
      self._count(UNPAIRED if unpaired else IGNORED, member.name)
      return
    if match[1] != self._group.key or extension in self._group.extensions:
      self._end_group()
      self._group = _Group(match[1])
    self._group.add(extension, member.offset, member.size)

  def finish(self) -> TarIndex:
    """Returns the index after the last member."""
    self._end_group()
    self.index.pairs = np.concatenate([*self._parts, np.array(self._rows, PAIR)])
    self.index.keys = bytes(self._keys)
    return self.index

  def _end_group(self) -> None:
    """Stores the pair of the group, and notes what is wrong with it."""
    group = self._group
    if group.image and group.text:
      self._keys.extend(group.key)
      (image, image_size), (text, text_size) = group.image, group.text
      self._rows.append((image, text, image_size, text_size, len(self._keys), group.is_json))
      if len(self._rows) == _BUFFERED:
        self._parts.append(np.array(self._rows, PAIR))
        self._rows.clear()
      if group.key in self._paired:
        self._count(REPEATED, group.key)
      self._paired.add(group.key)
      if len(group.extensions & _IMAGES) > 1:
        self._count(SEVERAL, group.key)
    elif group.key:
      self._count(NO_TEXT if group.image else NO_IMAGE, group.key)

  def _count(self, kind: str, name: bytes) -> None:
    """Counts a key or member, and keeps the first names."""
    self.index.skipped[kind] = self.index.skipped.get(kind, 0) + 1
    named = self.index.named.setdefault(kind, [])
    if len(named) < _NAMED:
      named.append(name.decode("utf-8", "replace"))


class _Group:
  """The adjacent members of one key: offset and size of the image and of the text, once known."""

  def __init__(self, key: bytes):
    self.key = key
    self.extensions: set[bytes] = set()
    self.image: tuple[int, int] | None = None
    self.text: tuple[int, int] | None = None
    self.is_json = False

  def add(self, extension: bytes, offset: int, size: int) -> None:
    """Adds a member that is not empty, of an extension in _USED."""
    self.extensions.add(extension)
    if extension in _IMAGES:
      self.image = self.image or (offset, size)
    elif extension == b"txt":
      self.text = offset, size
      self.is_json = False
    elif not self.text:
      self.text = offset, size
      self.is_json = True
