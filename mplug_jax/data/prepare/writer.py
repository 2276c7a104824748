"""The files that tools.prepare_data writes: all of them, or none."""

import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Literal

from mplug_jax.runtime import atomic_files, json_text


@contextlib.contextmanager
def writing(folder: str, overwrite: bool = False) -> Iterator["Output"]:
  """Writes files that take their names when the block ends without an error.

  After an error nothing remains of them.

  Args:
    folder: where they are written; created if necessary.
    overwrite: replace existing files.

  Yields:
    An Output.

  Raises:
    ValueError: a file would have no entry.
    FileExistsError: as in Output.entries.
  """
  created: list[str] = []
  missing = os.path.abspath(folder)
  while not os.path.isdir(missing):
    created.append(missing)
    missing = os.path.dirname(missing)
  os.makedirs(folder, exist_ok=True)
  try:
    with contextlib.ExitStack() as stack:
      out = Output(folder, overwrite, stack)
      yield out
      out.end()
  except BaseException:
    with contextlib.suppress(OSError):  # they contain something else
      for path in created:
        os.rmdir(path)
    raise


class Entries:
  """A file of JSON entries.

  Attributes:
    path: where it will be.
    title: a plural noun for its entries.
    count: number of entries so far.
  """

  def __init__(self, file: BinaryIO, path: str, title: str):
    self._file = file
    self.path = path
    self.title = title
    self.count = 0
    self._by_line = path.endswith(".jsonl")

  def add(self, entry: Any) -> None:
    """Appends an entry, any value that JSON can represent."""
    separator = b",\n" if self.count else b"[\n"
    line = json_text.dumps(entry).encode()
    self._file.write(line + b"\n" if self._by_line else separator + line)
    self.count += 1

  def end(self) -> None:
    """Completes the file."""
    if not self._by_line:
      self._file.write(b"\n]\n")


class Output:
  """The files that `writing` writes.

  Attributes:
    folder: where files are written.
    lines: lines to print about them after the end.
  """

  def __init__(self, folder: str, overwrite: bool, stack: contextlib.ExitStack):
    self.folder = folder
    self.lines: list[str] = []
    self._overwrite = overwrite
    self._stack = stack
    self._files: list[Entries] = []

  def entries(self, name: str, title: str) -> Entries:
    """Starts a file of entries, a JSON list or, if named .jsonl, one entry a line.

    Args:
      name: name of the file.
      title: a plural noun for its entries.

    Returns:
      The Entries to add to.

    Raises:
      FileExistsError: it exists, and may not be replaced.
    """
    path, file = self._open(name)
    self._files.append(Entries(file, path, title))
    return self._files[-1]

  def value(self, name: str, value: Any, title: str) -> None:
    """Writes a file with one JSON value.

    Args:
      name: name of the file.
      value: any value that JSON can represent.
      title: its content, in words.

    Raises:
      FileExistsError: as in `entries`.
    """
    path, file = self._open(name)
    file.write(json_text.dumps(value).encode() + b"\n")
    self.lines.append(f"wrote {path}: {title}")

  def _open(self, name: str) -> tuple[str, BinaryIO]:
    """Returns (path, open file that takes its place)."""
    path = os.path.join(self.folder, name)
    if os.path.exists(path) and not self._overwrite:
      raise FileExistsError(
        f"{path} exists; remove it, replace it with --overwrite, or choose another folder with "
        "--out."
      )
    return path, self._stack.enter_context(atomic_files.open_atomic(path))

  def end(self) -> None:
    """Completes all files; raises ValueError if one has no entry."""
    for entries in self._files:
      if not entries.count:
        raise ValueError(
          f"{entries.path} would have no entry; check that the annotations and the images of this "
          "split are complete."
        )
      entries.end()
    written = [f"wrote {file.path}: {file.count:,} {file.title}" for file in self._files]
    self.lines = written + self.lines

  def note(self, text: str) -> None:
    """Adds a note to the lines to print."""
    self.lines.append(f"note: {text}")

  def command(
    self,
    config: str,
    *arguments: str,
    mode: Literal["train", "evaluate"],
    flags: Mapping[str, Any] | None = None,
  ) -> None:
    """Adds the command that reads the files to the lines to print.

    Args:
      config: name of a config.
      *arguments: its arguments, which follow the colon.
      mode: what it does; an evaluation needs a run.
      flags: {"data.x": value}, further settings.
    """
    words = ["python", "-m", "mplug_jax.main"]
    if mode == "evaluate":
      words += ["--mode=evaluate", "--checkpoint=RUN"]
    words.append(f"--config=configs/{config}.py:{','.join(arguments)}")
    words += [f"--config.{name}={value}" for name, value in (flags or {}).items()]
    self.lines.append(f"{mode}: {shlex.join([*words, '--config.tokenizer.path=vocab.txt'])}")
