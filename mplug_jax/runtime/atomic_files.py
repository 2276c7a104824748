"""Writes files atomically: a reader sees the old file or the complete new one."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO


@contextlib.contextmanager
def open_atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
  """Opens a binary file that replaces the one at `path` when the block ends without an error.

  Until then a reader of `path` sees the old bytes; after an error `path` is unchanged and no
  temporary file remains.

  Args:
    path: file to write.

  Yields:
    A temporary file, opened for writing.

  Raises:
    OSError: the bytes could not be written (disk full, no permission); names `path`.
  """
  path = os.fspath(path)
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


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
  """Replaces the file at `path` atomically.

  Args:
    path: file to write.
    data: its contents.

  Raises:
    OSError: see `open_atomic`.
  """
  with open_atomic(path) as file:
    file.write(data)


def write_json(path: str | os.PathLike[str], values: Any) -> None:
  """Writes indented JSON atomically.

  Args:
    path: file to write.
    values: JSON values.

  Raises:
    TypeError: JSON cannot represent the values; nothing is written.
    OSError: see `open_atomic`.
  """
  write_atomic(path, (json.dumps(values, indent=2) + "\n").encode())
