"""Records in memory as bytes: a million annotations take at most the space of their file.

As Python objects they take a kilobyte each, the garbage collector visits all of them again and
again, and worker processes receive them one by one. Here they are one block of bytes, and a record
is made when it is requested.
"""

import array
import marshal
import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

# Values packed at a time: takes half as long as one by one, and a few microseconds to read one.
_BLOCK = 16


def _identity(value: Any) -> Any:
  return value


class Packed(Sequence):
  """A growing list of values of plain types.

  Plain types are None, booleans, numbers, texts, and lists, tuples and dictionaries of them.
  """

  def __init__(self, keys: Sequence[str] | None = None):
    """Makes an empty list.

    Args:
      keys: the values are dictionaries that have these keys, at least two, and no others; None: any
        values.
    """
    self._keys = tuple(keys) if keys else None
    self._values = operator.itemgetter(*keys) if keys else _identity
    self._bytes = bytearray()  # blocks of _BLOCK values
    self._ends = array.array("q")  # the ends of the blocks
    self._last: list[Any] = []  # values after the last block

  def append(self, value: Any) -> None:
    """Appends a value.

    Args:
      value: a value of a plain type.

    Raises:
      KeyError: a key is missing.
      ValueError: one of the last _BLOCK values holds another type.
    """
    self._last.append(self._values(value))
    if len(self._last) == _BLOCK:
      self._bytes += marshal.dumps(self._last)  # the fastest format; only this process reads it
      self._ends.append(len(self._bytes))
      self._last = []

  def __len__(self) -> int:
    return len(self._ends) * _BLOCK + len(self._last)

  def __getitem__(self, index: int) -> Any:
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} is not among the {len(self)}")
    block, position = divmod(int(index), _BLOCK)
    if block < len(self._ends):
      start = self._ends[block - 1] if block else 0
      packed = memoryview(self._bytes)[start : self._ends[block]]
    else:
      packed = marshal.dumps(self._last)
    value = marshal.loads(packed)[position]
    return value if self._keys is None else dict(zip(self._keys, value))


class Grouped(Sequence):
  """Records that hold a list of items each, such as an image and its questions.

  Items may be added in any order.
  """

  def __init__(self, keys: Sequence[str], name: str, item_keys: Sequence[str] | None = None):
    """Makes an empty collection.

    Args:
      keys: keys of a record, without that of its items.
      name: key of the list of items.
      item_keys: keys of an item, as in Packed.
    """
    self._heads = Packed(keys)
    self._name = name
    self._items = Packed(item_keys)
    self._owner = array.array("q")
    self._numbers: dict[Hashable, int] = {}
    self._order: np.ndarray | None = None
    self._count = 0
    self._counts = np.zeros(0, np.int64)
    self._ends = self._counts

  def find(self, key: Hashable) -> int | None:
    """Returns the number of the record that was added with this key, or None."""
    return self._numbers.get(key)

  def add(self, head: Mapping[str, Any], key: Hashable | None = None) -> int:
    """Adds a record without items.

    Args:
      head: the record's other values.
      key: what `find` finds it by; None: it is not looked for.

    Returns:
      Its number.
    """
    number = self._count
    if key is not None:
      self._numbers[key] = number
    self._heads.append(head)
    self._count += 1
    return number

  def add_item(self, number: int, item: Any) -> None:
    """Adds an item to a record.

    Args:
      number: the record.
      item: its next item.

    Raises:
      KeyError, ValueError: as in Packed.append.
    """
    self._items.append(item)
    self._owner.append(number)

  def close(self) -> "Grouped":
    """Ends adding: drops the keys that `find` uses.

    Returns:
      This collection.
    """
    owner = np.frombuffer(self._owner, np.int64) if len(self._owner) else np.zeros(0, np.int64)
    self._counts = np.bincount(owner, minlength=len(self._heads)).astype(np.int64)
    self._ends = self._counts.cumsum()
    in_order = len(owner) < 2 or bool((owner[1:] >= owner[:-1]).all())
    self._order = None if in_order else np.argsort(owner, kind="stable")
    self._numbers = {}
    self._owner = array.array("q")
    return self

  def __len__(self) -> int:
    return len(self._heads)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {**self._heads[index], self._name: self.items(index)}

  def head(self, index: int) -> dict[str, Any]:
    """Returns a record without its items."""
    return self._heads[index]

  def items(self, index: int) -> list[Any]:
    """Returns the items of a record, in the order in which they were added."""
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} is not among the {len(self)}")
    positions = range(self._ends[index] - self._counts[index], self._ends[index])
    return [self._items[i if self._order is None else self._order[i]] for i in positions]

  def counts(self) -> Int[np.ndarray, "records"]:
    """Returns the number of items of every record."""
    return self._counts.copy()
