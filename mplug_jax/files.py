"""Writing files so that a reader, or the next start, finds the old file or the whole new one."""

import contextlib
import json
import os


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
  """Replaces the file at `path`: a reader sees the old bytes or the new ones, never a part.

  Raises:
    OSError: the bytes could not be written (disk full, no permission); `path` is untouched and
      no temporary file remains.
  """
  temporary = f"{os.fspath(path)}.tmp{os.getpid()}"
  try:
    with open(temporary, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.remove(temporary)
    raise


def write_json(path: str | os.PathLike, values) -> None:
  """`write_atomic` of indented JSON. Raises TypeError for what JSON cannot hold, before anything is written."""
  write_atomic(path, (json.dumps(values, indent=2) + "\n").encode())
