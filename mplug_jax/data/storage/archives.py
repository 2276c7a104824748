"""Files inside zip and tar archives, read in place.

"/data/train.zip/a/b.jpg" is the member a/b.jpg of the file /data/train.zip. Such a path is a plain
string, which any thread or process can read. Each process lists an archive when it first reads from
it (about 300 bytes per member). The archive itself is open only while a member is read, so nothing
is shared and any number of archives can be used.
"""

import contextlib
import errno
import os
import posixpath
import re
import struct
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from mplug_jax.data.errors import note
from mplug_jax.data.storage import tar_headers

_IN_ARCHIVE = re.compile(r"\.(?:zip|tar|tar\.(?:gz|bz2|xz|zst)|tgz|tbz2?|txz)(?=/)", re.IGNORECASE)
# Lengths of the name and the extra field, which follow the local header of a zip member.
_LOCAL_HEADER = struct.Struct("<26xHH")

_ZIP = b"PK\x03\x04"  # first bytes of a zip file

StrPath = str | os.PathLike[str]


class _Member(NamedTuple):
  """Location of a member of an archive.

  Attributes:
    offset: position of its data; for zip, of its local header.
    stored: bytes in the archive.
    size: bytes after unpacking.
    method: compression method of zip; None for tar.
    crc: checksum of zip.
    flags: flags of zip.
  """

  offset: int
  stored: int
  size: int
  method: int | None = None
  crc: int = 0
  flags: int = 0


# Archive -> (its size and modification time when it was listed, {name: _Member}).
_indices: dict[str, tuple[tuple[int, int], dict[str, _Member]]] = {}
_lock = threading.Lock()


def _reset_lock() -> None:
  """Replaces the lock in a forked child, which lacks the thread that might have held it."""
  global _lock
  _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
  os.register_at_fork(after_in_child=_reset_lock)


def split(path: StrPath) -> tuple[str, str] | None:
  """Splits a path that leads into an archive.

  Args:
    path: any path.

  Returns:
    (archive, name of the member), or None for a path that leads into no archive.
  """
  path = os.fspath(path)
  for match in _IN_ARCHIVE.finditer(path):
    if os.path.isfile(path[: match.end()]):  # a folder may have such a name too
      return path[: match.end()], posixpath.normpath(path[match.end() + 1 :])
  return None


def is_file(path: StrPath) -> bool:
  """Returns whether a file or a member of an archive exists.

  Args:
    path: path of a file, or one that leads into an archive.

  Raises:
    ValueError: the archive cannot be used.
  """
  parts = split(path)
  if parts is None:
    return os.path.isfile(path)
  archive, name = parts
  with open(archive, "rb") as file:
    return name in _members(archive, file)


def open_bytes(path: StrPath) -> bytes:
  """Reads a file, or a member of an archive, as a whole.

  Args:
    path: path of a file, or one that leads into an archive.

  Returns:
    Its bytes, unpacked.

  Raises:
    FileNotFoundError: there is no such file or member.
    ValueError: the archive is compressed as a whole, damaged or no archive, or the member is
      damaged, encrypted or packed by a method other than deflate.
    OSError: the file cannot be read.
  """
  parts = split(path)
  if parts is None:
    with open(path, "rb") as file:
      return file.read()
  archive, name = parts
  with open(archive, "rb") as file:
    member = _members(archive, file).get(name)
    if member is None:
      raise FileNotFoundError(errno.ENOENT, "not in the archive", os.fspath(path))
    return _read(file, member, f"{name} in {archive}")


@contextlib.contextmanager
def local_file(path: StrPath) -> Iterator[str]:
  """Gives readers that only take paths a path to a file or a member of an archive.

  Args:
    path: path of a file, or one that leads into an archive.

  Yields:
    The path itself, or that of a temporary copy of the member.

  Raises:
    FileNotFoundError, ValueError, OSError: as in `open_bytes`.
  """
  if split(path) is None:
    yield os.fspath(path)
    return
  with tempfile.NamedTemporaryFile(suffix=os.path.splitext(path)[1]) as file:
    file.write(open_bytes(path))
    file.flush()
    yield file.name


def _members(archive: str, file: BinaryIO) -> dict[str, _Member]:
  """Returns the members of an open archive by name, listed again if the archive was replaced."""
  status = os.fstat(file.fileno())
  stamp = status.st_size, status.st_mtime_ns
  if _indices.get(archive, (None,))[0] != stamp:
    with _lock:  # one thread lists, the others wait for it
      if _indices.get(archive, (None,))[0] != stamp:
        list_members = _list_zip if archive.lower().endswith(".zip") else _list_tar
        _indices[archive] = stamp, list_members(archive, file)
  return _indices[archive][1]


class _Listing(dict[str, _Member]):
  """The members of an archive by name."""

  def __init__(self, archive: str):
    super().__init__()
    self._archive = archive
    self._repeated: list[str] = []

  def add(self, name: str, member: _Member) -> None:
    """Adds a member, in place of an earlier one of that name."""
    if self.setdefault(name, member) != member:
      self._repeated.append(name)
      self[name] = member

  def note_repeated(self) -> None:
    """Tells how many members were replaced."""
    if self._repeated:
      note(
        f"{self._archive}: {len(self._repeated)} files have the name of a later one, which "
        f"counts; the first is {self._repeated[0]}."
      )


def _list_zip(archive: str, file: BinaryIO) -> dict[str, _Member]:
  """Lists a zip file; raises ValueError if it is none."""
  members = _Listing(archive)
  try:
    with zipfile.ZipFile(file) as zipped:
      for member in zipped.infolist():
        if not member.is_dir():
          described = _Member(
            member.header_offset,
            member.compress_size,
            member.file_size,
            member.compress_type,
            member.CRC,
            member.flag_bits,
          )
          members.add(posixpath.normpath(member.filename), described)
  except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
    reason = str(error).rstrip(".")
    raise ValueError(f"{archive} is not a zip file, or is cut off ({reason}).") from None
  # Of two joined zip files, the list at the end has the members of the second.
  first = min((member.offset for member in members.values()), default=0)
  file.seek(0)
  if first and file.read(len(_ZIP)) == _ZIP:
    note(f"{archive} has another zip file in its first {first} bytes, whose files are not found.")
  members.note_repeated()
  return members


def _list_tar(archive: str, file: BinaryIO) -> dict[str, _Member]:
  """Lists a tar up to the first header that is none; raises ValueError if it cannot be used."""
  if file.read(6).startswith(tar_headers.COMPRESSED):
    raise ValueError(
      f"{archive} is a compressed tar, whose files cannot be reached without unpacking all before "
      "them: unpack it, or pack its files as zip."
    )
  size = os.fstat(file.fileno()).st_size
  members = _Listing(archive)
  try:
    if not size:
      raise tar_headers.DamageError("is empty")
    for member in tar_headers.members(file, size):
      name = _normalized(member.name)
      if member.link is None:
        members.add(name, _Member(member.offset, member.size, member.size))
      elif (target := _normalized(member.link)) in members:
        members.add(name, members[target])
      end = member.offset + tar_headers.padded(member.size)
      if end > size:
        raise tar_headers.DamageError(f"is cut off at byte {size}", in_data=True)
  except tar_headers.DamageError as error:
    if not members or error.in_data:
      raise ValueError(f"{archive} is not a tar file, or is cut off ({error}).") from None
    note(f"{archive} {error}; the files behind that are not found.")
  members.note_repeated()
  return members


def _normalized(name: bytes) -> str:
  """Returns the name of a tar's member as text, without "./" and double slashes."""
  return posixpath.normpath(name.decode("utf-8", "surrogateescape"))


def _read(file: BinaryIO, member: _Member, name: str) -> bytes:
  """Reads a member of an open archive; raises ValueError, whose message begins with `name`."""
  offset = member.offset
  if member.flags & 1:
    raise ValueError(f"{name} is encrypted; archives of images must not be.")
  if member.method not in (None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    raise ValueError(
      f"{name} is packed by method {member.method} of zip; only stored and deflated files are read."
    )
  if member.method is not None:
    file.seek(offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) == _LOCAL_HEADER.size:
      offset += len(header) + sum(_LOCAL_HEADER.unpack(header))
  file.seek(offset)
  data = file.read(member.stored)
  if member.method == zipfile.ZIP_DEFLATED:
    try:
      data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
    except zlib.error as error:
      raise ValueError(f"{name} is damaged ({error}).") from None
  if len(data) != member.size or member.method is not None and zlib.crc32(data) != member.crc:
    raise ValueError(f"{name} is damaged or cut off.")
  return data
