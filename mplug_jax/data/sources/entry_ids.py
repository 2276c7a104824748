"""Ids of the entries of a split, checked while they are read."""

import math
import numbers
from typing import Any

from mplug_jax.metrics import ids


class EntryIds:
  """Ids of the entries of a split.

  An entry without an id gets its number. In splits that are evaluated, ids must differ as results
  files write them (7 and "7" do not), since results could not be told apart; the ids of training
  entries are written nowhere and may be anything.
  """

  def __init__(self, key: str, split: str):
    """Begins a split.

    Args:
      key: key of the ids, for messages.
      split: "train", "val" or "test".
    """
    self._key = key
    self._checked = split != "train"
    self._count = 0
    self._locations: dict[int | str, str] = {}

  def add(self, given: Any, location: str) -> Any:
    """Returns the id of the next entry.

    Args:
      given: its id in the file; None: it has none.
      location: its file and line, entry or row.

    Raises:
      ValueError: in an evaluated split, the id is no number or text, or another entry has it.
    """
    entry_id = self._count if given is None else given
    self._count += 1
    if self._checked:
      self._check(entry_id, given is None, location)
    return entry_id

  def _check(self, entry_id: Any, is_number: bool, location: str) -> None:
    check_type(entry_id, self._key, location)
    first = self._locations.setdefault(ids.canonical(entry_id), location)
    if first is location:
      return
    problem = (
      f"there is no {self._key}, and its number {entry_id} is also that"
      if is_number
      else f"{self._key} {entry_id!r} is also that"
    )
    raise ValueError(
      f"{location}: {problem} of {first}, so that results could not be told apart; give every "
      f"entry of an evaluated split its own {self._key}, or none of them one."
    )


def check_type(entry_id: Any, key: str, location: str) -> None:
  """Checks that an id can be written and compared.

  Args:
    entry_id: the id.
    key: its key.
    location: its file and line, entry or row.

  Raises:
    ValueError: it is neither text nor a finite number.
  """
  number = isinstance(entry_id, numbers.Real) and not isinstance(entry_id, bool)
  if not isinstance(entry_id, str) and not (number and math.isfinite(entry_id)):
    raise ValueError(f"{location}: {key} must be a number or text, not {entry_id!r}.")
