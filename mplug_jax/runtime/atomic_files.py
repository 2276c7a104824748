"""Writing files so that a reader, or the next start, finds the old file or the whole new one."""

import contextlib
import json
import os


@contextlib.contextmanager
def open_atomic(path: str | os.PathLike):
  """A binary file, opened for writing, that takes the place of the file at `path` when the block ends without an error.

  Until then a reader of `path` sees the old bytes; after an error `path` is untouched and no
  temporary file remains.

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
      raise OSError(
        error.errno, error.strerror, path
      ) from error  # a failed write does not say where
    raise


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
  """Replaces the file at `path` as a whole. Raises OSError as `open_atomic` does."""
  with open_atomic(path) as file:
    file.write(data)


def write_json(path: str | os.PathLike, values) -> None:
  """`write_atomic` of indented JSON. Raises TypeError for what JSON cannot hold, before anything is written."""
  write_atomic(path, (json.dumps(values, indent=2) + "\n").encode())
