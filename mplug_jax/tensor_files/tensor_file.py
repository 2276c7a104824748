"""A read-only mapping from tensor names to arrays, read one at a time."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

_CHUNK = 1 << 24


class Entry(NamedTuple):
  shape: tuple[int, ...]
  dtype: np.dtype
  load: Callable[[], np.ndarray]


class TensorFile(Mapping):
  """A checkpoint on disk: name -> array, read when asked for, in the file's order. Not for several threads at once.

  Attributes:
    path: the file or folder.
    wrapper: where in the checkpoint the tensors were: "model", "module", "model/module", ..., or "" for the top level.
    placeholders: {qualified name of a class or function that was not run: how many objects}.
    ignored: {key: type} of the values beside the tensors.
    metadata: {name: text} of a safetensors file.
  """

  def __init__(
    self,
    path,
    entries,
    close=lambda: None,
    wrapper="",
    placeholders=None,
    ignored=None,
    metadata=None,
  ):
    self.path, self.wrapper = path, wrapper
    self.placeholders, self.ignored, self.metadata = (
      placeholders or {},
      ignored or {},
      metadata or {},
    )
    self._entries = entries
    self._close = close

  def __getitem__(self, name: str) -> np.ndarray:
    """Reads one tensor into memory of its own. Raises KeyError; ValueError if the file ends inside it."""
    return self._entries[name].load()

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)

  def __contains__(self, name) -> bool:  # Mapping's own would read the tensor
    return name in self._entries

  def shape(self, name: str) -> tuple[int, ...]:
    return self._entries[name].shape

  def dtype(self, name: str) -> np.dtype:
    """numpy's dtype; ml_dtypes.bfloat16 for bfloat16."""
    return self._entries[name].dtype

  def close(self) -> None:
    self._close()

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()


def read_chunked(file, offset, count, dtype, where):
  """`count` elements at a byte offset -> array [count] in memory of its own."""
  array = np.empty(count, dtype)
  view = memoryview(array.view(np.uint8))
  file.seek(offset)
  done = 0
  while done < len(view):
    got = file.readinto(view[done : done + _CHUNK])
    if not got:
      raise ValueError(f"{where}: the file ends inside this tensor; get it again.")
    done += got
  return array
