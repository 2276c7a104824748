"""The results file of the predict command, which continues the same job only. No JAX.

Beside FILE lies FILE.job.json, which says whose results FILE holds: the method, its options, and
digests of the weights, the tokenizer, the config and the rows. A file that is not this job's is
refused before anything is written.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from mplug_jax.data.text import unicode
from mplug_jax.runtime import files, json_text
from mplug_jax.runtime.atomic_files import write_json

_WHOLE = 1 << 20  # bytes; of larger files of weights, the digest reads blocks
_MADE_BY = "mplug_jax.predict"

Row = dict[str, Any]


def digest(path: str | os.PathLike) -> str:
  """Returns a digest of a file or of all files of a folder; "" if there is nothing.

  Of a run it reads what a Predictor reads: config, tokenizer and the newest checkpoint. Of large
  files it reads blocks, so that gigabytes of weights take no time.

  Args:
    path: local or remote path.
  """
  root = files.open_path(path)
  if not root.exists():
    return ""
  entries = [root]
  checkpoints = root / "checkpoints"
  if root.is_dir() and checkpoints.is_dir():
    steps = [step for step in checkpoints.iterdir() if step.name.isdigit()]
    newest = [max(steps, key=lambda step: int(step.name))] if steps else []
    entries = [root / "config.json", root / "tokenizer", *newest]
  total = hashlib.sha256()
  for entry in entries:
    for file in _files_of(entry):
      total.update(f"{os.path.relpath(file, root)} {files.digest(file, _WHOLE)}\n".encode())
  return total.hexdigest()


def _files_of(path: Any) -> Iterator[Any]:
  """Yields a file, or the files of a folder, sorted by path."""
  if path.is_dir():
    for entry in sorted(path.iterdir(), key=str):
      yield from _files_of(entry)
  elif path.exists():
    yield path


class ResultFile:
  """A JSONL file of results, one line for each row, in the rows' order.

  Attributes:
    path: of the file; it is created by the first `write`.
    done: number of rows with a line in the file when this object was created.
    failed: number of these lines with an error.
  """

  def __init__(self, path: str, job: Mapping[str, Any]):
    """Reads the file, if there is one; changes nothing.

    Args:
      path: of the file.
      job: what its results depend on, JSON values by name.

    Raises:
      ValueError: the file exists and is not of this job, or no file can be written there.
    """
    self.path = path
    self.done = 0
    self.failed = 0
    self._job = {"made_by": _MADE_BY, **job}
    self._end = 0  # bytes of whole lines
    self._size = 0  # bytes of the file
    self._file: BinaryIO | None = None
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
      raise ValueError(f"--output={path}: the folder {folder} does not exist; create it first.")
    if os.path.isdir(path):
      raise ValueError(f"--output={path} is a folder; name a file.")
    self._is_regular = not os.path.exists(path) or stat.S_ISREG(os.stat(path).st_mode)
    self._size = os.path.getsize(path) if self._is_regular and os.path.exists(path) else 0
    self._tail = b""  # of an interrupted write
    recorded = self._recorded_job()
    if self._size:
      self._compare(recorded)
      self._count_lines(recorded is not None)

  @property
  def _job_path(self) -> str:
    return f"{self.path}.job.json"

  def _refusal(self, reason: str) -> ValueError:
    return ValueError(f"{self.path} exists and {reason}; choose another --output.")

  def _recorded_job(self) -> dict[str, Any] | None:
    """Returns the job in FILE.job.json, None without that file."""
    recorded = None
    with contextlib.suppress(FileNotFoundError, ValueError):
      recorded = json.loads(pathlib.Path(self._job_path).read_bytes())
    if isinstance(recorded, dict) and recorded.get("made_by") == _MADE_BY:
      return recorded
    if os.path.exists(self._job_path):
      raise ValueError(
        f"{self._job_path} is no file of this command, which would write it; choose another "
        "--output."
      )
    return None

  def _compare(self, recorded: Mapping[str, Any] | None) -> None:
    """Raises ValueError if the recorded job is another one."""
    for name, value in self._job.items():
      if recorded is not None and recorded.get(name) != value:
        raise self._refusal(
          f"has results of another job, whose {name} is {_short(recorded.get(name))} instead of "
          f"{_short(value)}"
        )

  def _count_lines(self, is_recorded: bool) -> None:
    """Counts the whole lines. Raises ValueError: the file has lines that are no results."""
    with open(self.path, "rb") as file:
      for line in file:
        if not line.endswith(b"\n"):
          self._tail = line
        elif _object(line) is None:
          raise self._refusal(f"is not a file of results: line {self.done + 1} is no JSON object")
        else:
          self.done += 1
          self._end += len(line)
    if not (self.done or is_recorded):
      raise self._refusal("is not a file of results")

  def check(
    self, rows: Iterator[Row], total: int, results: set[str] | None, error: str, others: set[str]
  ) -> None:
    """Checks that the file begins with the results of the first rows.

    Args:
      rows: the rows of the job, from the first.
      total: their number.
      results: keys that this job adds to every row that does not fail; None: not known.
      error: key that it adds to a row that fails.
      others: keys that it adds to some rows.

    Raises:
      ValueError: a line is not the result of its row.
    """
    if not self._size:
      return
    if self.done + bool(self._tail) > total:
      raise self._refusal(f"has more lines than the {total} rows, so it is not of this job")
    with open(self.path, "rb") as file:
      for number in range(1, self.done + 1):
        line = _object(file.readline()) or {}
        row = next(rows)
        added = line.keys() - row.keys() - others
        same = all(line.get(key, _ABSENT) == value for key, value in row.items())
        known = ({error}, added if results is None and added else results)
        if not same or added not in known:
          raise self._refusal(f"line {number} is not the result of row {number}")
        self.failed += error in added
    if self._tail:
      begin = to_line(next(rows))[:-2].encode()
      length = min(len(begin), len(self._tail))
      if self._tail[:length] != begin[:length]:
        raise self._refusal(f"line {self.done + 1} does not begin with row {self.done + 1}")

  def write(self, lines: Sequence[Row]) -> None:
    """Appends objects and flushes them.

    The first call records the job and removes an incomplete last line.

    Raises:
      ValueError: another process writes the file.
    """
    if self._file is None:
      self._file = self._open()
    self._file.write("".join(to_line(line) for line in lines).encode())
    self._file.flush()

  def _open(self) -> BinaryIO:
    if not self._is_regular:  # as /dev/stdout
      return open(self.path, "wb")
    file = open(self.path, "ab")  # noqa: SIM115 - closed by `close`
    _lock(file, self.path)
    if os.path.getsize(self.path) != self._size:
      file.close()
      raise ValueError(f"Another process has written {self.path}; choose another --output.")
    write_json(self._job_path, self._job)
    file.truncate(self._end)
    return file

  def close(self) -> None:
    """Closes the file if anything was written."""
    if self._file:
      self._file.close()


_ABSENT = object()


def to_line(row: Row) -> str:
  """Returns a row as a line of JSON that can be written as UTF-8.

  Args:
    row: JSON values; lone surrogates are written as escapes.
  """
  text = json_text.dumps(row, ensure_ascii=False)
  return (json_text.dumps(row) if unicode.invalid_unicode(text) else text) + "\n"


def _object(line: bytes) -> Row | None:
  """Returns the JSON object of a line, None if it is something else."""
  with contextlib.suppress(ValueError):
    value = json.loads(line)
    if isinstance(value, dict):
      return value
  return None


def _short(value: Any) -> str:
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) <= 60 else f"{text[:50]} ..."


def _lock(file: BinaryIO, path: str) -> None:
  """Locks a file until it is closed. Raises ValueError: another process has locked it."""
  try:
    import fcntl
  except ImportError:  # Windows
    return
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.close()
    raise ValueError(
      f"Another process writes {path}; wait for it, or choose another --output."
    ) from None
  except OSError:  # a file system without locks
    return
