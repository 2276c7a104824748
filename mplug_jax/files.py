"""Files that are either the old one or the whole new one, never a part."""

import contextlib
import json
import os


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
  """Replaces the file at `path`, whose folder is created if necessary.

  Raises:
    OSError: the bytes could not be written (disk full, no permission); `path` is untouched and no temporary file remains.
  """
  path = os.fspath(path)
  os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
  temporary = f"{path}.tmp{os.getpid()}"
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


def write_json(path: str | os.PathLike, value) -> None:
  """Replaces the file at `path` by `value` as indented json; raises as write_atomic does."""
  write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
