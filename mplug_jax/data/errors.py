"""Exceptions of the data packages, notes on data, and the count of records that cannot be used."""

import contextlib
from collections.abc import Iterator

from absl import logging

NAMED = 10  # records that the log names

_open_lists: list[list[str]] = []  # of the `noted` blocks around the caller


def note(sentence: str) -> None:
  """Tells the user something about the data: in the log, or to the block of `noted` around it.

  Args:
    sentence: says what is wrong or left out, with file and line, key or id.
  """
  if _open_lists:
    _open_lists[-1].append(sentence)
  else:
    logging.warning("%s", sentence)


@contextlib.contextmanager
def noted() -> Iterator[list[str]]:
  """Collects the notes of a block, which the log then lacks, for a report.

  Yields:
    The list that they are appended to.
  """
  sentences: list[str] = []
  _open_lists.append(sentences)
  try:
    yield sentences
  finally:
    _open_lists.pop()


class RecordError(ValueError):
  """Raised for one record that cannot be used; `BadRecords` counts it unless data.strict is set."""


class ImageError(RecordError):
  """Raised for an image that cannot be read: missing, truncated, corrupt, too large, no image."""


class BadRecords:
  """Counts records that cannot be used and names the first ten in the log.

  Attributes:
    count: number of records, each time they were met.
    sentences: one sentence for each of the first ten different ones.
  """

  def __init__(self, strict: bool = False, effect: str = "It is left out."):
    """Begins a count.

    Args:
      strict: config.data.strict; the first bad record is raised.
      effect: sentence that says what the record lacks from now on.
    """
    self._strict = strict
    self._effect = effect
    self.count = 0
    self.sentences: list[str] = []

  def add(self, error: RecordError) -> None:
    """Counts a record.

    Args:
      error: says what is wrong, with file and line, key or id.

    Raises:
      RecordError: `error`, if strict.
    """
    if self._strict:
      raise error
    self.count += 1
    sentence = str(error)
    if len(self.sentences) < NAMED and sentence not in self.sentences:
      self.sentences.append(sentence)
      note(f"{sentence} {self._effect}")

  def report(self, total: int, records: str) -> None:
    """Logs how many of all records were bad, if there are more than the log named.

    Args:
      total: number of all records.
      records: their name, in the plural, and their file.
    """
    if self.count > len(self.sentences):
      note(f"{self.count} of {total} {records} cannot be used.")
