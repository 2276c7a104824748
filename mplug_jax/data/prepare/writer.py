"""Files that tools.prepare_data writes: all of them, or none."""

import contextlib
import json
import os
import shlex

from mplug_jax.runtime import atomic_files


@contextlib.contextmanager
def writing(folder, overwrite=False):
  """Files in a folder that take their names when the block ends without an error.

  Otherwise nothing is left of them.

  Args:
    folder: made if need be.
    overwrite: replace files that are there.

  Yields:
    an Output.

  Raises:
    ValueError: a file would have no entry. FileExistsError: see Output.entries.
  """
  made, missing = [], os.path.abspath(folder)
  while not os.path.isdir(missing):
    made.append(missing)
    missing = os.path.dirname(missing)
  os.makedirs(folder, exist_ok=True)
  try:
    with contextlib.ExitStack() as stack:
      out = Output(folder, overwrite, stack)
      yield out
      out.end()
  except BaseException:
    with contextlib.suppress(OSError):  # something else is in them
      for path in made:
        os.rmdir(path)
    raise


class Output:
  """What `writing` yields.

  Attributes:
    folder: where files are written.
    lines: what is to be printed about them, in the end.
  """

  def __init__(self, folder, overwrite, stack):
    self.folder, self._overwrite, self._stack = folder, overwrite, stack
    self._files, self.lines = [], []

  def entries(self, name, what):
    """A file of entries, a json list or, called .jsonl, one a line: see Entries.

    `what`: what they are called.

    Raises:
      FileExistsError: it is there, and may not be overwritten.
    """
    path, file = self._open(name)
    self._files.append(Entries(file, path, what))
    return self._files[-1]

  def value(self, name, value, what):
    """A file of one json value. `what`: what is in it. Raises FileExistsError as `entries`."""
    path, file = self._open(name)
    file.write(json.dumps(value).encode() + b"\n")
    self.lines.append(f"wrote {path}: {what}")

  def _open(self, name):
    """-> (path, file that takes its place)."""
    path = os.path.join(self.folder, name)
    if os.path.exists(path) and not self._overwrite:
      raise FileExistsError(
        f"{path} exists; remove it, give --overwrite to replace it, or another folder as --out."
      )
    return path, self._stack.enter_context(atomic_files.open_atomic(path))

  def end(self):
    """All files are complete. Raises ValueError if one has no entry."""
    for entries in self._files:
      if not entries.count:
        raise ValueError(
          f"{entries.path} would have no entry: the annotations, or the images that are there, "
          f"hold none for it."
        )
      entries.end()
    self.lines = [
      f"wrote {entries.path}: {entries.count:,} {entries.what}" for entries in self._files
    ] + self.lines

  def note(self, text):
    """A line to print."""
    self.lines.append(f"note: {text}")

  def command(self, config, *arguments, mode, flags=None):
    """The command that reads what was written, as a line to print.

    Args:
      config: name of a config. arguments: of it, behind the colon.
      mode: what it does, "train" or "evaluate"; an evaluation needs a run.
      flags: {"data.x": value}, further settings.
    """
    words = ["python", "-m", "mplug_jax.main"]
    words += ["--mode=evaluate", "--checkpoint=RUN"] if mode == "evaluate" else []
    words += [f"--config=configs/{config}.py:{','.join(arguments)}"]
    words += [f"--config.{name}={value}" for name, value in (flags or {}).items()]
    self.lines.append(f"{mode}: {shlex.join([*words, '--config.tokenizer.path=vocab.txt'])}")


class Entries:
  """A file of json entries. count: how many; what: what they are called."""

  def __init__(self, file, path, what):
    self._file, self.path, self.what, self.count = file, path, what, 0
    self._by_line = path.endswith(".jsonl")

  def add(self, entry):
    """Appends an entry, anything that JSON can hold."""
    separator = b"" if self._by_line else b",\n" if self.count else b"[\n"
    self._file.write(separator + json.dumps(entry).encode() + b"\n" * self._by_line)
    self.count += 1

  def end(self):
    """The file is complete."""
    if not self._by_line:
      self._file.write(b"\n]\n")
