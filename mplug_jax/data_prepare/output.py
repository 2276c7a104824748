"""Files that tools.prepare_data writes: all of them, or none."""

import contextlib
import json
import os
import shlex

from mplug_jax import files


class Output:
  """A context in which annotation files are written to a folder; they take their names when it ends without an error.

  Args:
    folder: where; made if need be.
    overwrite: replace files that are there.

  Attributes:
    lines: what is to be printed about it.
  """

  def __init__(self, folder, overwrite=False):
    self.folder, self._overwrite = folder, overwrite
    self._stack, self._lists, self._made, self.lines = contextlib.ExitStack(), [], [], []

  def __enter__(self):
    folder = self.folder
    while folder and not os.path.isdir(folder):
      self._made.append(folder)
      folder = os.path.dirname(folder)
    os.makedirs(self.folder, exist_ok=True)
    return self

  def __exit__(self, kind, value, trace):
    empty = [] if kind else [entries.path for entries in self._lists if not entries.count]
    if not kind:
      for entries in self._lists:
        entries.end()
    try:
      if empty:
        raise ValueError(f"Nothing would be in {empty[0]}: the annotations hold no record for it.")
    except ValueError as error:
      self._stack.__exit__(ValueError, error, None)
      self._remove_folders()
      raise
    self._stack.__exit__(kind, value, trace)
    if kind:
      self._remove_folders()
    self.lines = [f"wrote {entries.path}: {entries.count:,} {entries.what}" for entries in self._lists] + self.lines

  def _remove_folders(self):
    with contextlib.suppress(OSError):  # something else is in them
      for folder in self._made:
        os.rmdir(folder)

  def entries(self, name, what):
    """A file of entries, a json list or, called .jsonl, one a line: see Entries. `what`: what they are called.

    Raises:
      FileExistsError: it is there, and may not be overwritten.
    """
    path = os.path.join(self.folder, name)
    if os.path.exists(path) and not self._overwrite:
      raise FileExistsError(f"{path} exists; remove it, give --overwrite to replace it, or another folder as --out.")
    entries = Entries(self._stack.enter_context(files.open_atomic(path)), path, what)
    self._lists.append(entries)
    return entries

  def note(self, text):
    """A line to print."""
    self.lines.append(f"note: {text}")

  def command(self, config, *arguments, flags=(), mode=""):
    """The command that reads what was written, as a line to print.

    Args:
      config: name of a config. arguments: of it, behind the colon. flags: {"data.x": value} behind it.
      mode: what it does, "train" or "evaluate"; an evaluation needs a run.
    """
    words = ["python", "-m", "mplug_jax.main"]
    words += ["--mode=evaluate", "--checkpoint=RUN"] if mode == "evaluate" else []
    words += [f"--config=configs/{config}.py:{','.join(arguments)}"]
    words += [f"--config.{name}={value}" for name, value in dict(flags).items()]
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
      self._file.write(b"\n]\n" if self.count else b"[]\n")
