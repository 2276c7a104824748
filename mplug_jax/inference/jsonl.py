"""Input rows and the JSONL results file of the predict command. No JAX."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from mplug_jax.data.images.suffixes import IMAGE_SUFFIXES
from mplug_jax.data.storage import annotations


def of_folder(folder: str) -> Iterator[dict[str, str]]:
  """Yields {"image": path} for all images under a folder, sorted by name.

  Raises:
    FileNotFoundError: the folder has no images.
  """
  empty = True
  for parent, folders, names in os.walk(folder):
    folders.sort()
    for name in sorted(names):
      if name.lower().endswith(IMAGE_SUFFIXES):
        empty = False
        yield {"image": os.path.join(parent, name)}
  if empty:
    raise FileNotFoundError(f"{folder} has no images ({', '.join(IMAGE_SUFFIXES)}).")


def of_file(path: str, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
  """Yields the objects of a JSONL file.

  Args:
    path: file with one JSON object a line.
    keys: keys that every object must have.

  Raises:
    ValueError: a line is not an object or lacks a key; the message gives file and line.
  """
  for row, location in annotations.lines(path):
    if not isinstance(row, dict):
      raise ValueError(f"{location} is not a JSON object.")
    if missing := [key for key in keys if key not in row]:
      raise ValueError(
        f"{location} has no {' and no '.join(missing)}; it has {', '.join(row) or 'nothing'}."
      )
    yield row


class Results:
  """A JSONL file to which results are appended, one line for each row, in the rows' order.

  Attributes:
    path: of the file; it is created by the first `write`.
    done: number of rows with a line in the file when this object was created.
  """

  def __init__(self, path: str):
    """Removes an incomplete last line of the file. Raises ValueError: not a results file."""
    self.path = path
    self.done, self._last = _remove_incomplete_line(path)
    self._file: TextIO | None = None

  def check(self, row: dict[str, Any]) -> None:
    """Raises ValueError unless the file's last line is the result of `row`."""
    if any(self._last.get(key) != value for key, value in row.items()):
      raise ValueError(
        f"{self.path} has results of other rows (line {self.done} is not of row {self.done}); "
        "choose another --output or remove the file."
      )

  def write(self, lines: Sequence[dict[str, Any]]) -> None:
    """Appends objects and flushes them."""
    if self._file is None:
      self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
    self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    self._file.flush()

  def close(self) -> None:
    """Closes the file if anything was written."""
    if self._file:
      self._file.close()


def _remove_incomplete_line(path: str) -> tuple[int, dict[str, Any]]:
  """Truncates the file after its last complete line; returns the line count and the last object.

  Without the file or without lines these are 0 and {}.
  """
  with contextlib.suppress(FileNotFoundError), open(path, "rb+") as file:
    count = 0
    end = 0
    last = b"{}"
    for line in file:
      if not line.endswith(b"\n"):
        break
      count += 1
      end += len(line)
      last = line
    file.truncate(end)
    try:
      last_object = json.loads(last)
    except ValueError:
      last_object = None
    if not isinstance(last_object, dict):
      raise ValueError(
        f"{path} is not a file of results: line {count} is not a JSON object; choose another "
        "--output."
      )
    return count, last_object
  return 0, {}
