"""Records in memory as bytes: a million annotations of a data set in the space that their file takes, or less.

As Python objects they take a kilobyte each, the garbage collector walks through all of them again
and again, and worker processes get them one by one. Here they are one block of bytes, and a record
is made when it is asked for.
"""

import array
import marshal
import operator
from collections.abc import Sequence

import numpy as np

_BLOCK = (
  16  # values packed at a time: half the time of each by itself, and a few microseconds to read one
)


def _itself(value):
  return value


class Packed(Sequence):
  """A list that grows, of values of plain types: None, booleans, numbers, texts, and lists, tuples and dictionaries of such.

  Args:
    keys: the values are dictionaries that have these keys, two at least, and no others; None: they
      are anything.
  """

  def __init__(self, keys=None):
    self._keys, self._values = keys and tuple(keys), operator.itemgetter(*keys) if keys else _itself
    self._bytes, self._ends, self._last = (
      bytearray(),
      array.array("q"),
      [],
    )  # blocks of _BLOCK values, and those of the last one

  def append(self, value) -> None:
    """Raises KeyError: a key is missing.

    ValueError: something among the last _BLOCK values is of another type.
    """
    self._last.append(self._values(value))
    if len(self._last) == _BLOCK:
      self._bytes += marshal.dumps(
        self._last
      )  # the quickest of all; only this very program reads it
      self._ends.append(len(self._bytes))
      self._last = []

  def __len__(self):
    return len(self._ends) * _BLOCK + len(self._last)

  def __getitem__(self, index):
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} is not among the {len(self)}")
    block, place = divmod(int(index), _BLOCK)
    start = self._ends[block - 1] if block else 0
    packed = (
      memoryview(self._bytes)[start : self._ends[block]]
      if block < len(self._ends)
      else marshal.dumps(self._last)
    )
    value = marshal.loads(packed)[place]
    return value if self._keys is None else dict(zip(self._keys, value))


class Grouped(Sequence):
  """Records that hold a list of items each, such as an image and its questions.

  The items come in any order.

  Args:
    keys: of a record, without that of its items.
    name: key of the list of items.
    item_keys: of an item, see Packed.
  """

  def __init__(self, keys, name, item_keys=None):
    self._heads, self._name, self._items = Packed(keys), name, Packed(item_keys)
    self._owner, self._numbers, self._order, self._count = array.array("q"), {}, None, 0

  def find(self, key) -> int | None:
    """Number of the record that `add` gave this key, or None."""
    return self._numbers.get(key)

  def add(self, head, key=None) -> int:
    """A record without items so far -> its number.

    Key: hashable, for `find`; None: it is not looked for.
    """
    number = self._count
    if key is not None:
      self._numbers[key] = number
    self._heads.append(head)
    self._count += 1
    return number

  def add_item(self, number, item) -> None:
    """The next item of a record; errors as of Packed.append."""
    self._items.append(item)
    self._owner.append(number)

  def close(self) -> "Grouped":
    """Itself, without what only `find` needs. No more may be added."""
    owner = np.frombuffer(self._owner, np.int64) if len(self._owner) else np.zeros(0, np.int64)
    self._counts = np.bincount(owner, minlength=len(self._heads)).astype(np.int64)
    self._ends = self._counts.cumsum()
    in_order = len(owner) < 2 or bool((owner[1:] >= owner[:-1]).all())
    self._order = None if in_order else np.argsort(owner, kind="stable")
    self._numbers, self._owner = {}, array.array("q")
    return self

  def __len__(self):
    return len(self._heads)

  def __getitem__(self, index):
    return {**self._heads[index], self._name: self.items(index)}

  def head(self, index) -> dict:
    """A record without its items."""
    return self._heads[index]

  def items(self, index) -> list:
    """The items of a record, in the order in which they came."""
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} is not among the {len(self)}")
    places = range(self._ends[index] - self._counts[index], self._ends[index])
    return [self._items[i if self._order is None else self._order[i]] for i in places]

  def counts(self) -> np.ndarray:
    """i64[N]: items of every record."""
    return self._counts.copy()
