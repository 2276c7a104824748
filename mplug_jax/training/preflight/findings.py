"""Prints the findings of a check as they come and counts errors and warnings."""

import contextlib
from collections.abc import Iterator

from absl import logging

from mplug_jax.checkpoints import errors

_LABEL_WIDTH = 10  # columns


class Findings:
  """Printed findings; `errors` counts what training would fail with."""

  def __init__(self) -> None:
    self.errors = 0
    self.warnings = 0

  def add(self, label: str, *lines: object) -> None:
    """Prints lines, the first one behind its label."""
    for number, line in enumerate(lines):
      print(f"{label if number == 0 else '':<{_LABEL_WIDTH}}{line}", flush=True)

  def warn(self, message: object) -> None:
    """Prints and counts a warning."""
    self.warnings += 1
    self.add("warning", message)

  def error(self, message: object) -> None:
    """Prints and counts an error."""
    self.errors += 1
    self.add("error", message)

  @contextlib.contextmanager
  def catch(self) -> Iterator[None]:
    """Turns the exceptions that end a run with a message into errors."""
    try:
      yield
    except (ValueError, OSError, errors.CheckpointError) as error:
      logging.debug("Traceback:", exc_info=True)
      self.error(error)

  def verdict(self) -> None:
    """Prints whether training will work, with the number of errors and warnings."""
    warnings = f", {_count(self.warnings, 'warning')}" if self.warnings else ""
    if self.errors:
      self.add("verdict", f"this will not train, {_count(self.errors, 'error')}{warnings}")
    else:
      self.add("verdict", f"this will train{warnings}")


def _count(number: int, noun: str) -> str:
  return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
