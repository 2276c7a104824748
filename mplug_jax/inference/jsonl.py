"""Rows of the command line of mplug_jax.predict: where they come from, and the file of results that grows line by line. No JAX."""

import contextlib
import json
import os

from mplug_jax.data.storage import annotations

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def of_folder(folder):
  """Yields {"image": path} of all images under a folder, in the order of their names. Raises FileNotFoundError: there are none."""
  found = False
  for place, folders, names in os.walk(folder):
    folders.sort()
    for name in sorted(names):
      if name.lower().endswith(IMAGES):
        found = True
        yield {"image": os.path.join(place, name)}
  if not found:
    raise FileNotFoundError(f"{folder} has no images ({', '.join(IMAGES)}).")


def of_file(path, keys):
  """Yields the objects on the lines of a JSONL file, which must have `keys`. Raises ValueError: names file and line."""
  for row, where in annotations.lines(path):
    if not isinstance(row, dict):
      raise ValueError(f"{where} is no json object.")
    if missing := [key for key in keys if key not in row]:
      raise ValueError(
        f"{where} has no {' and no '.join(missing)}; it has {', '.join(row) or 'nothing'}."
      )
    yield row


class Results:
  """A JSONL file to which results are appended: a line for each row, in their order, so that the lines say how far it went.

  Raises (when made):
    ValueError: the file holds results of other rows.
  """

  def __init__(self, path):
    self.path = path
    self.done, self._last = _mend(path)
    self._file = None

  def check(self, row):
    """The last row that was done before must be the one in the last line. Raises ValueError."""
    if any(self._last.get(key) != value for key, value in row.items()):
      raise ValueError(
        f"{self.path} holds results of other rows (line {self.done} is not of row {self.done}); name another --output, or "
        "remove it."
      )

  def write(self, lines):
    """Appends objects; they are in the file when this returns, and without a first one there is no file."""
    self._file = self._file or open(self.path, "a", encoding="utf-8")
    self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    self._file.flush()

  def close(self):
    if self._file:
      self._file.close()


def _mend(path):
  """Cuts off a last line that was not written to its end -> (number of lines, the last as an object or {})."""
  with contextlib.suppress(FileNotFoundError), open(path, "rb+") as file:
    count, end, last = 0, 0, b"{}"
    for line in file:
      if not line.endswith(b"\n"):
        break
      count, end, last = count + 1, end + len(line), line
    file.truncate(end)
    try:
      found = json.loads(last)
    except ValueError:
      found = None
    if not isinstance(found, dict):
      raise ValueError(
        f"{path} is no file of results: its line {count} is no json object; name another --output."
      )
    return count, found
  return 0, {}
