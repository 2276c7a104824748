"""Counts the entries of annotation files that cannot be used."""

from mplug_jax.data.errors import BadRecords, RecordError


def split_location(location: str) -> tuple[str, str]:
  """Returns (file; entry, line or row) of a location; the file is "" if it is no part of a file.

  Args:
    location: "FILE, line 3".
  """
  file, _, entry = location.rpartition(", ")
  return file, entry


class EntryErrors(BadRecords):
  """BadRecords of files: one bad entry among others is counted, a file of bad entries is an error.

  One wrong box is a slip of an annotator; if all boxes are wrong, the file is, or its description.

  Attributes:
    total: number of entries so far.
  """

  def __init__(self, strict: bool = False, effect: str = "It is left out."):
    """Begins a count.

    Args:
      strict: as in BadRecords.
      effect: as in BadRecords.
    """
    super().__init__(strict, effect)
    self.total = 0
    self._good: set[str] = set()
    self._first: dict[str, RecordError] = {}  # of each file

  def passed(self, location: str) -> None:
    """Counts an entry that can be used.

    Args:
      location: of the entry, as annotations.entries gives it.
    """
    self.total += 1
    self._good.add(split_location(location)[0])

  def failed(self, location: str, error: RecordError) -> None:
    """Counts an entry that cannot be used.

    Args:
      location: of the entry, as annotations.entries gives it.
      error: says what is wrong with it, and where it is.

    Raises:
      RecordError: `error`, if strict.
    """
    self.total += 1
    self._first.setdefault(split_location(location)[0], error)
    self.add(error)

  def end(self, entries: str) -> None:
    """Ends the count, after the last entry.

    Args:
      entries: name of the entries, in the plural.

    Raises:
      RecordError: a file has no entry that can be used; says what is wrong with the first one.
    """
    for file, error in self._first.items():
      if file not in self._good:
        owner = f" of {file}" if file else ""
        raise RecordError(f"{error} None of the {entries}{owner} can be used.") from error
    self.report(self.total, entries)
