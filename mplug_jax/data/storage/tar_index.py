"""Where the pairs of an image and a text lie in a tar of the WebDataset layout, so that any pair is read by itself.

The layout is that of img2dataset: members of one pair stand next to each other and are called
KEY.EXTENSION, where KEY ends at the first dot of the file's name. The image is .jpg, .jpeg, .png or
.webp; the text is that of .txt, or, where there is none, "caption" of .json. Other members are
ignored.

The headers are read once, from one to the next without what lies between, and their places kept in
files under $XDG_CACHE_HOME (default: ~/.cache) until the tar changes. A pair takes 29 bytes and its
key.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mplug_jax.data.storage import archives, remote
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
NO_IMAGE, NO_TEXT = "an image", "a text"

_VERSION = 1  # of the files that are kept
_BLOCK = 512
_IMAGES = frozenset((b"jpg", b"jpeg", b"png", b"webp"))
_NAME = re.compile(rb"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)
_NAMED = 3  # keys of skipped pairs that are kept
_AT_A_TIME = 4096  # pairs that are Python objects
_THREADS = 16


@dataclasses.dataclass
class TarIndex:
  """The pairs of one tar.

  Attributes:
    pairs: PAIR[N]. keys: their keys, one behind the other.
    skipped: {NO_IMAGE or NO_TEXT: number of keys without it}. named: {the same: a few of those
      keys}.
    damage: "" or, of a tar that cannot be read to its end, the sentence that says so; `pairs` are
      those before.
  """

  path: str
  pairs: np.ndarray
  keys: bytes
  skipped: dict
  named: dict
  damage: str = ""

  def __len__(self):
    return len(self.pairs)

  def key(self, number) -> str:
    start = int(self.pairs["key_end"][number - 1]) if number else 0
    return self.keys[start : int(self.pairs["key_end"][number])].decode("utf-8", "replace")


def load(paths) -> list[TarIndex]:
  """The indices of several files, each named once, read or made by threads.

  Raises:
    FileNotFoundError: there is no such file. ValueError: it is compressed, or no tar at all.
      OSError: it cannot be read.
  """
  with ThreadPoolExecutor(min(_THREADS, max(1, len(paths)))) as pool:
    return list(pool.map(_load, paths))


def _load(path):
  size, stamp = remote.state(path)
  kept = _kept_file(path)
  with contextlib.suppress(
    OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile
  ):  # none, of another tar, or not whole
    with np.load(kept, allow_pickle=False) as found:
      about = json.loads(found["about"].tobytes())
      if about.pop("stamp") == [_VERSION, stamp]:
        return TarIndex(
          path, found["pairs"].astype(PAIR, copy=False), found["keys"].tobytes(), **about
        )
  index = _make(path, size)
  with contextlib.suppress(OSError):  # no place to keep it: it is made anew each time
    os.makedirs(os.path.dirname(kept), exist_ok=True)
    about = {
      "stamp": [_VERSION, stamp],
      "skipped": index.skipped,
      "named": index.named,
      "damage": index.damage,
    }
    with atomic_files.open_atomic(kept) as file:
      np.savez(
        file,
        pairs=index.pairs,
        keys=np.frombuffer(index.keys, np.uint8),
        about=np.frombuffer(json.dumps(about).encode(), np.uint8),
      )
  return index


def _kept_file(path):
  """Where the index of a tar is kept."""
  folder = os.path.join(
    os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "mplug_jax", "shards"
  )
  whole = path if remote.is_remote(path) else os.path.abspath(path)
  return os.path.join(
    folder, f"{hashlib.sha256(whole.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.npz"
  )


def _make(path, size):
  """The TarIndex of a file of `size` bytes, from its headers."""
  index = TarIndex(path, np.zeros(0, PAIR), b"", {}, {})
  parts, rows, keys, group = [], [], bytearray(), _Group(b"")

  def finish():
    """Notes the pair of the group that has ended."""
    if (missing := group.missing()) and group.key:
      index.skipped[missing] = index.skipped.get(missing, 0) + 1
      if len(named := index.named.setdefault(missing, [])) < _NAMED:
        named.append(group.key.decode("utf-8", "replace"))
    elif not missing:
      keys.extend(group.key)
      rows.append(
        (group.image[0], group.text[0], group.image[1], group.text[1], len(keys), group.is_json)
      )
      if len(rows) == _AT_A_TIME:
        parts.append(np.array(rows, PAIR))
        rows.clear()

  with remote.open_file(path) as file:
    if file.read(6).startswith(archives.COMPRESSED):
      raise ValueError(
        f"{path} is a compressed tar, in which no file can be reached without unpacking all "
        f"before it: unpack it."
      )
    last = b""
    try:
      for name, offset, length in _members(file, size):
        last = name
        if not (match := _NAME.fullmatch(name)):
          continue
        if match[1] != group.key:
          finish()
          group = _Group(match[1])
        group.add(match[2].lower(), offset, length)
    except _DamageError as error:
      if not last:
        raise ValueError(f"{path} is not a tar file, or is cut off ({error}).") from None
      index.damage = f"{path} {error}; its last good member is {last.decode('utf-8', 'replace')}."
    finish()
  index.pairs, index.keys = np.concatenate([*parts, np.array(rows, PAIR)]), bytes(keys)
  return index


class _Group:
  """The members of one key: places and sizes of the image and of the text, once they are known."""

  def __init__(self, key):
    self.key, self.image, self.text, self.is_json = key, None, None, False

  def add(self, extension, offset, size):
    if not size:
      return
    if extension in _IMAGES:
      self.image = self.image or (offset, size)
    elif extension == b"txt":
      self.text, self.is_json = (offset, size), False
    elif extension == b"json" and not self.text:
      self.text, self.is_json = (offset, size), True

  def missing(self):
    """What the pair lacks, or ""."""
    return NO_IMAGE if not self.image else NO_TEXT if not self.text else ""


class _DamageError(Exception):
  """A tar does not go on as it should; the message goes on behind its path."""


def _members(file, size):
  """(name, place of its data, bytes) of every file in a tar of `size` bytes.

  Raises _DamageError behind the last good one.
  """
  position, extended = 0, {}
  while position < size:
    file.seek(position)
    header = file.read(_BLOCK)
    if len(header) < _BLOCK:
      raise _DamageError(f"is cut off at byte {position}")
    if not any(header):
      return
    try:
      length = extended.get("size", _number(header[124:136]))
      intact = _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * ord(" ")
    except ValueError:
      intact = False
    if not intact:
      raise _DamageError(f"is damaged at byte {position}")
    kind, start = header[156:157], position + _BLOCK
    if start + length > size:
      raise _DamageError(f"is cut off in the member at byte {position}")
    if kind == b"x":  # what the next header has no room for, as pax writes it
      extended |= _pax(file.read(length))
    elif kind == b"L":  # the same, as GNU tar writes a long name
      extended["name"] = file.read(length).rstrip(b"\0")
    else:
      if kind in (b"0", b"\0"):
        yield extended.get("name") or _name(header), start, length
      extended = {}
    position = start + -(-length // _BLOCK) * _BLOCK


def _number(field):
  """A number of a header: octal digits, or, if the first bit is set, binary. Raises ValueError."""
  return (
    int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.strip(b" \0") or b"0", 8)
  )


def _name(header):
  name = header[:100].split(b"\0", 1)[0]
  prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
  return prefix + b"/" + name if prefix else name


def _pax(data):
  """Name and size from records "LENGTH KEY=VALUE\\n". Raises _DamageError."""
  found = {}
  while data:
    try:
      length = int(data.split(b" ", 1)[0])
      key, value = data[:length].split(b" ", 1)[1].split(b"=", 1)
      if key == b"path":
        found["name"] = value[:-1]
      elif key == b"size":
        found["size"] = int(value)
    except (ValueError, IndexError):
      raise _DamageError("has a damaged pax header") from None
    data = data[max(1, length) :]
  return found
