"""Files inside zip and tar archives, read in place: "/data/train.zip/a/b.jpg" is the member a/b.jpg of the file /data/train.zip.

Such a path is a plain string, which any thread or process can read. What an archive holds is listed
once a process, when it first reads from it (about 300 bytes a member); the archive itself is open
only while a member is read, so that nothing is shared and any number of archives can be used.
"""

import contextlib
import errno
import os
import posixpath
import re
import struct
import tarfile
import tempfile
import threading
import zipfile
import zlib
from typing import NamedTuple

_IN_ARCHIVE = re.compile(r"\.(?:zip|tar|tar\.(?:gz|bz2|xz|zst)|tgz|tbz2?|txz)(?=/)", re.IGNORECASE)
COMPRESSED = (
  b"\x1f\x8b",
  b"BZh",
  b"\xfd7zXZ",
  b"\x28\xb5\x2f\xfd",
)  # first bytes of gzip, bzip2, xz and zstd
_LOCAL_HEADER = struct.Struct(
  "<26xHH"
)  # of a zip member: lengths of its name and of its extra field, which its data follow


class _Member(NamedTuple):
  """Where the data of a member begin (of zip: its local header), bytes there, bytes unpacked.

  Of zip method, checksum and flags.
  """

  offset: int
  stored: int
  size: int
  method: int | None = None
  crc: int = 0
  flags: int = 0


_indices = {}  # archive -> (its size and time of change when it was listed, {name: _Member})
_lock = threading.Lock()


def _forget_lock():
  """A forked child has the lock as it was, and not the thread that might have held it."""
  global _lock
  _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
  os.register_at_fork(after_in_child=_forget_lock)


def split(path):
  """A path that leads through an archive -> (archive, name of the member).

  None for any other path.
  """
  path = os.fspath(path)
  for match in _IN_ARCHIVE.finditer(path):
    if os.path.isfile(path[: match.end()]):  # a folder may be called so too
      return path[: match.end()], posixpath.normpath(path[match.end() + 1 :])
  return None


def is_file(path) -> bool:
  """Whether a file or a member of an archive exists.

  Raises ValueError for an archive that cannot be used.
  """
  found = split(path)
  if found is None:
    return os.path.isfile(path)
  with open(found[0], "rb") as file:
    return found[1] in _members(found[0], file)


def open_bytes(path) -> bytes:
  """All bytes of a file, or of a member of an archive.

  Raises:
    FileNotFoundError: there is no such file or member.
    ValueError: the archive is compressed as a whole, damaged or no archive, or the member is
      damaged, encrypted or packed by a method other than deflate.
    OSError: the file cannot be read.
  """
  found = split(path)
  if found is None:
    with open(path, "rb") as file:
      return file.read()
  archive, name = found
  with open(archive, "rb") as file:
    member = _members(archive, file).get(name)
    if member is None:
      raise FileNotFoundError(errno.ENOENT, "not in the archive", os.fspath(path))
    return _read(file, member, f"{name} in {archive}")


@contextlib.contextmanager
def local_file(path):
  """The path itself, or that of a temporary copy of a member of an archive, for readers that take paths alone; errors as of open_bytes."""
  if split(path) is None:
    yield os.fspath(path)
    return
  with tempfile.NamedTemporaryFile(suffix=os.path.splitext(path)[1]) as file:
    file.write(open_bytes(path))
    file.flush()
    yield file.name


def _members(archive, file):
  """{name: _Member} of an open archive; listed anew if it was replaced."""
  status = os.fstat(file.fileno())
  stamp = status.st_size, status.st_mtime_ns
  if _indices.get(archive, (None,))[0] != stamp:
    with _lock:  # one thread lists, the others wait for it
      if _indices.get(archive, (None,))[0] != stamp:
        list_members = _list_zip if archive.lower().endswith(".zip") else _list_tar
        _indices[archive] = stamp, list_members(archive, file)
  return _indices[archive][1]


def _list_zip(archive, file):
  try:
    with zipfile.ZipFile(file) as found:
      return {
        posixpath.normpath(member.filename): _Member(
          member.header_offset,
          member.compress_size,
          member.file_size,
          member.compress_type,
          member.CRC,
          member.flag_bits,
        )
        for member in found.infolist()
        if not member.is_dir()
      }
  except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
    raise ValueError(
      f"{archive} is not a zip file, or is cut off ({str(error).rstrip('.')})."
    ) from None


def _list_tar(archive, file):
  if file.read(6).startswith(COMPRESSED):
    raise ValueError(
      f"{archive} is a compressed tar, in which no file can be reached without unpacking all "
      f"before it: unpack it, or pack "
      "its files as zip."
    )
  file.seek(0)
  members = {}
  try:
    with tarfile.open(fileobj=file, mode="r:") as found:
      while (member := found.next()) is not None:
        name = posixpath.normpath(member.name)
        if member.isreg():
          members[name] = _Member(member.offset_data, member.size, member.size)
        elif member.islnk() and (link := posixpath.normpath(member.linkname)) in members:
          members[name] = members[link]
        found.members.clear()  # it would keep a large object for each
  except tarfile.TarError as error:
    raise ValueError(
      f"{archive} is not a tar file, or is cut off ({str(error).rstrip('.')})."
    ) from None
  return members


def _read(file, member, name):
  """The bytes of a member of an open archive. Raises ValueError; `name` is for messages."""
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
    offset += (
      len(header) + sum(_LOCAL_HEADER.unpack(header)) if len(header) == _LOCAL_HEADER.size else 0
    )
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
