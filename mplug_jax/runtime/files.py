"""Files and folders on this machine's disk or in an object store such as gs://bucket/run.

Local paths are pathlib paths, all others are etils.epath paths, so that the same calls work on both
(`open_path("gs://bucket/run").exists()`). etils is imported only when a remote path is used.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
  from etils import epath

PathLike: TypeAlias = str | os.PathLike
AnyPath: TypeAlias = "pathlib.Path | epath.Path"

_BLOCK = 1 << 20  # bytes
_BLOCKS = 16
_UPLOAD_SECONDS = 10.0  # an object can be replaced about once per second


def is_remote(path: PathLike) -> bool:
  """Returns whether a path is a URL such as gs://bucket/file instead of a local path."""
  return "://" in os.fspath(path)


def open_path(path: PathLike) -> Any:
  """Returns a path object with the interface of pathlib, local or remote; nothing is read.

  Raises:
    ValueError: no backend for such a URL.
  """
  if not is_remote(path):
    return pathlib.Path(path)
  from etils import epath

  try:
    return epath.Path(path)
  except KeyError:
    scheme = os.fspath(path).partition("://")[0]
    raise ValueError(
      f"{path}: {scheme}:// is not supported; use a local path or gs://, s3://, az://, hf://."
    ) from None


def absolute(path: PathLike) -> Any:
  """Returns `open_path`, of a local path the absolute one."""
  return open_path(path) if is_remote(path) else open_path(path).absolute()


def require_local(path: PathLike, purpose: str) -> None:
  """Raises ValueError if a path is remote.

  Args:
    path: path to check.
    purpose: subject of the message, for example "the export".
  """
  if is_remote(path):
    raise ValueError(
      f"{path}: {purpose} needs a local path; copy between this disk and the object store "
      "with the store's own tool (gcloud storage cp)."
    )


def digest(path: PathLike, whole: int) -> str:
  """Returns a digest of a file's bytes; of a large file, of blocks.

  Args:
    path: local or remote file.
    whole: largest size in bytes of a file that is read as a whole. Of a larger one 16 blocks of 1
      MiB are read, evenly spaced, the first and the last included.
  """
  digested = hashlib.blake2b(digest_size=16)
  with open_path(path).open("rb") as file:
    size = file.seek(0, os.SEEK_END)
    starts = [0]
    if size > whole:
      starts = [max(0, size - _BLOCK) * number // (_BLOCKS - 1) for number in range(_BLOCKS)]
    for start in starts:
      file.seek(start)
      digested.update(file.read(_BLOCK if size > whole else whole))
  return digested.hexdigest()


def require_new(path: PathLike, overwrite: bool = False) -> None:
  """Checks that an output replaces no file, before anything is computed for it.

  Args:
    path: local file that a command will write; "" for none.
    overwrite: value of --overwrite, which allows it.

  Raises:
    FileExistsError: there is a file, and `overwrite` is False.
  """
  if os.fspath(path) and not overwrite and os.path.exists(path):
    raise FileExistsError(f"{path} exists; choose another file, or replace it with --overwrite.")


def require_own_lines(path: PathLike, keys: Collection[str]) -> None:
  """Checks that a file to which a command appends lines of JSON is absent, empty or its own.

  Args:
    path: local file; "" for none.
    keys: keys that every line of the command has.

  Raises:
    FileExistsError: the last line is something else.
  """
  if not os.fspath(path) or not os.path.exists(path) or not os.path.getsize(path):
    return
  with open(path, "rb") as file:
    *_, last = file
  row = None
  with contextlib.suppress(ValueError):
    row = json.loads(last)
  if not (last.endswith(b"\n") and isinstance(row, dict) and row.keys() >= set(keys)):
    raise FileExistsError(f"{path} exists and has no lines of this command; choose another file.")


def make_folder(path: PathLike) -> None:
  """Makes a folder and its parents where they are absent; object stores need none."""
  open_path(path).mkdir(parents=True, exist_ok=True)


def remove_folder(path: PathLike) -> None:
  """Removes a folder with all that is in it, if there is one."""
  if not is_remote(path):
    shutil.rmtree(path, ignore_errors=True)
  elif (folder := open_path(path)).exists():
    folder.rmtree()


def copy_folder(source: PathLike, destination: PathLike) -> None:
  """Copies a folder with all that is in it; each of the two may be local or remote.

  Args:
    source: existing folder.
    destination: folder that does not exist yet.
  """
  make_folder(destination)
  for path in open_path(source).iterdir():
    target = os.path.join(destination, path.name)
    if path.is_dir():
      copy_folder(path, target)
    else:
      open_path(target).write_bytes(path.read_bytes())


class LineFile:
  """A file to which lines are appended.

  A local file gets every line at once. An object cannot be appended to, so a remote file is kept in
  memory and replaced as a whole: with the first line after 10 seconds, and by `flush` and `close`.
  """

  def __init__(self, path: PathLike):
    """Opens a file, which is created if it is absent.

    Args:
      path: local or remote file.
    """
    self._path = os.fspath(path)
    self._uploaded_at = time.monotonic()
    self._is_new = False
    self._remote = is_remote(path)
    if self._remote:
      remote = open_path(path)
      self._data = bytearray(remote.read_bytes() if remote.exists() else b"")
    else:
      self._file = open(path, "ab")  # noqa: SIM115 - closed by `close`

  def write(self, lines: bytes) -> None:
    """Appends whole lines."""
    if not self._remote:
      self._file.write(lines)
      self._file.flush()
      return
    self._data += lines
    self._is_new = True
    if time.monotonic() - self._uploaded_at >= _UPLOAD_SECONDS:
      self.flush()

  def flush(self) -> None:
    """Makes all lines written so far readable by others."""
    if self._remote and self._is_new:
      open_path(self._path).write_bytes(bytes(self._data))
      self._uploaded_at = time.monotonic()
      self._is_new = False

  def close(self) -> None:
    """Flushes and closes the file; a second call does nothing."""
    self.flush()
    if not self._remote:
      self._file.close()
