"""Writing files so that a reader, or the next start, finds the old file or the whole new one."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from mplug_jax.runtime import files, json_text


@contextlib.contextmanager
def open_atomic(path: files.PathLike) -> Iterator[BinaryIO]:
  """Opens a binary file that replaces the file at `path` when the block ends without an error.

  Until then a reader of `path` sees the old bytes; after an error `path` is untouched and no
  temporary file remains. A remote path such as gs://bucket/file is uploaded at the end of the
  block, which object stores do atomically.

  Args:
    path: local or remote file.

  Yields:
    The file to write to.

  Raises:
    OSError: the bytes could not be written (disk full, no permission); names `path`.
  """
  with (_open_remote if files.is_remote(path) else _open_local)(os.fspath(path)) as file:
    yield file


@contextlib.contextmanager
def _open_local(path: str) -> Iterator[BinaryIO]:
  temporary = f"{path}.tmp{os.getpid()}"
  try:
    with open(temporary, "wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException as error:
    with contextlib.suppress(FileNotFoundError):
      os.remove(temporary)
    if isinstance(error, OSError) and error.errno and error.filename is None:
      # The error of a failed write does not name the file.
      raise OSError(error.errno, error.strerror, path) from error
    raise


@contextlib.contextmanager
def _open_remote(path: str) -> Iterator[BinaryIO]:
  with tempfile.TemporaryFile() as file:
    yield file
    file.seek(0)
    try:
      with files.open_path(path).open("wb") as remote:
        shutil.copyfileobj(file, remote)
    except OSError:
      raise
    except Exception as error:  # Every backend has its own.
      raise OSError(f"{path} could not be written: {error}.") from error


def write_atomic(path: files.PathLike, data: bytes) -> None:
  """Replaces the file at `path` as a whole. Raises OSError as `open_atomic` does."""
  with open_atomic(path) as file:
    file.write(data)


def write_json(path: files.PathLike, values: Any) -> None:
  """Writes indented JSON with `write_atomic`; numbers that are not finite become null.

  Raises:
    TypeError: JSON cannot hold the values; nothing is written.
  """
  write_atomic(path, (json_text.dumps(values, indent=2) + "\n").encode())
