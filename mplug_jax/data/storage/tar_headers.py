"""The one parser of tar headers: lists the members of a tar and where their data begins.

Reads USTAR, GNU (long names and links) and pax headers from one to the next and skips the data
between them. Behind the zeros that end a tar, another one may follow, as after `cat a.tar b.tar`;
its members are read too. The standard tarfile keeps an object per member and gives no byte
position of damage.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

# First bytes of gzip, bzip2, xz and zstd files.
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")

_BLOCK = 512
_CHUNK = 1 << 20  # bytes in which the end of zeros is looked for
_FILES = (b"0", b"\0", b"7")
_HARD_LINK = b"1"
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes: their size, if any, counts no data
_LONG = {b"L": "path", b"K": "linkpath"}  # GNU tar's headers for long names, as pax names them


class Member(NamedTuple):
  """A file or hard link in a tar.

  Attributes:
    name: its path as stored.
    offset: position of its data in the tar, in bytes.
    size: bytes of data.
    link: the path of the member that a hard link repeats; None for a file.
  """

  name: bytes
  offset: int
  size: int
  link: bytes | None = None


class DamageError(Exception):
  """The tar is damaged or cut off; the message continues a sentence that begins with its path.

  Attributes:
    in_data: whether it is cut off inside the data of a member.
  """

  def __init__(self, message: str, in_data: bool = False):
    super().__init__(message)
    self.in_data = in_data


def members(file: BinaryIO, size: int) -> Iterator[Member]:
  """Yields the files and hard links of a tar, in order.

  Args:
    file: the open tar.
    size: its size in bytes.

  Yields:
    Each Member.

  Raises:
    DamageError: a header is damaged, the tar is cut off, or what follows its end is no tar; comes
      after the last good member.
  """
  position = 0
  end = -1  # of the zeros that were skipped last
  extended: dict[str, Any] = {}
  describes_next = False
  while position < size:
    file.seek(position)
    header = file.read(_BLOCK)
    if len(header) < _BLOCK:
      raise DamageError(f"is cut off at byte {position}")
    if not any(header):
      position = end = _after_zeros(file, position + _BLOCK, size)
      describes_next = False
      extended = {}
      continue
    kind = header[156:157]
    length = _data_length(header, position, size - position if position == end else 0)
    describes_next = kind == b"x" or kind in _LONG
    if not describes_next:
      length = 0 if kind in _WITHOUT_DATA else extended.get("size", length)
    start = position + _BLOCK
    if kind == b"S":
      start = _after_sparse_map(file, header, start)
    if start + length > size:
      raise DamageError(f"is cut off in the member at byte {position}", in_data=True)
    if kind == b"x":
      extended |= _pax_records(file.read(length))
    elif kind in _LONG:
      extended[_LONG[kind]] = file.read(length).rstrip(b"\0")
    else:
      name = extended.get("path") or _name(header)
      if kind in _FILES and not (kind == b"\0" and name.endswith(b"/")):  # an old tar's folder
        yield Member(name, start, length)
      elif kind == _HARD_LINK:
        yield Member(name, start, 0, extended.get("linkpath") or _text(header[157:257]))
      extended = {}
    position = start + padded(length)
  if describes_next:
    raise DamageError(f"is cut off at byte {size}", in_data=True)


def _after_zeros(file: BinaryIO, position: int, size: int) -> int:
  """Returns the position of the next block that is not all zeros, or `size`."""
  while position < size:
    file.seek(position)
    chunk = file.read(_CHUNK)
    if rest := chunk.lstrip(b"\0"):
      return position + (len(chunk) - len(rest)) // _BLOCK * _BLOCK
    position += max(len(chunk), 1)
  return size


def padded(size: int) -> int:
  """Returns the bytes that data of `size` bytes take in a tar."""
  return -(-size // _BLOCK) * _BLOCK


def _data_length(header: bytes, position: int, rest: int) -> int:
  """Returns the size that a header gives; raises DamageError if its checksum is wrong.

  Args:
    header: the block.
    position: where it is in the tar.
    rest: bytes from there on, if it follows the end of a tar; otherwise 0.
  """
  problem = f"is damaged at byte {position}"
  if rest:
    problem = f"has {rest} bytes after its end, from byte {position} on, that are no tar"
  try:
    checksum = _number(header[148:156])
    length = _number(header[124:136])
  except ValueError:
    raise DamageError(problem) from None
  blank = 8 * ord(" ")  # the checksum counts its own field as spaces
  if checksum != sum(header) - sum(header[148:156]) + blank:
    signed = sum(byte - 256 * (byte > 127) for byte in header[:148] + header[156:])
    if checksum != signed + blank:  # some old programs summed signed bytes
      raise DamageError(problem)
  return length


def _number(field: bytes) -> int:
  """Reads a number: octal digits or, if the first bit is set, binary; raises ValueError."""
  if field[0] & 0x80:
    return int.from_bytes(field[1:], "big")
  return int(field.strip(b" \0") or b"0", 8)


def _text(field: bytes) -> bytes:
  """Returns a field up to its first zero byte."""
  return field.split(b"\0", 1)[0]


def _name(header: bytes) -> bytes:
  """Returns the name in a header, joined with the prefix of USTAR."""
  name = _text(header[:100])
  prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else b""
  return prefix + b"/" + name if prefix else name


def _after_sparse_map(file: BinaryIO, header: bytes, start: int) -> int:
  """Returns where the data of GNU tar's sparse file begins, after the blocks of its map."""
  continues = header[482]
  while continues:
    block = file.read(_BLOCK)
    continues = len(block) == _BLOCK and block[504]
    start += _BLOCK
  return start


def _pax_records(data: bytes) -> dict[str, Any]:
  r"""Reads path, linkpath and size from pax records "LENGTH KEY=VALUE\n"; raises DamageError."""
  records: dict[str, Any] = {}
  while data:
    try:
      length = int(data.split(b" ", 1)[0])
      key, value = data[:length].split(b" ", 1)[1].split(b"=", 1)
      if key in (b"path", b"linkpath"):
        records[key.decode()] = value[:-1]
      elif key == b"size":
        records["size"] = int(value)
    except (ValueError, IndexError):
      raise DamageError("has a damaged pax header") from None
    data = data[max(1, length) :]
  return records
