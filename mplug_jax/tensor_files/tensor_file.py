"""Read-only mapping from tensor names to arrays, read one at a time."""

import os
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np

_CHUNK = 1 << 24


class Entry(NamedTuple):
  """Shape and dtype of a tensor, and the function that reads it."""

  shape: tuple[int, ...]
  dtype: np.dtype
  load: Callable[[], np.ndarray]


class TensorFile(Mapping):
  """A checkpoint on disk as a lazy mapping name -> array, in the file's order; not thread-safe.

  Attributes:
    path: the file or folder.
    wrapper: path of the tensors inside the checkpoint: "model", "model/module", ..., or "" for the
      top level.
    placeholders: {qualified name of a class or function that was not run: number of objects}.
    ignored: {key: type} of values that are not tensors.
    metadata: {name: text} of a safetensors file.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    entries: dict[str, Entry],
    close: Callable[[], None] = lambda: None,
    wrapper: str = "",
    placeholders: dict[str, int] | None = None,
    ignored: dict[str, str] | None = None,
    metadata: dict[str, Any] | None = None,
  ) -> None:
    self.path = path
    self.wrapper = wrapper
    self.placeholders = placeholders or {}
    self.ignored = ignored or {}
    self.metadata = metadata or {}
    self._entries = entries
    self._close = close

  def __getitem__(self, name: str) -> np.ndarray:
    """Reads one tensor into new memory.

    Raises:
      KeyError: there is no such tensor.
      ValueError: the file ends inside it.
    """
    return self._entries[name].load()

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)

  def __contains__(self, name: object) -> bool:  # Mapping's implementation would read the tensor
    return name in self._entries

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor, without reading it."""
    return self._entries[name].shape

  def dtype(self, name: str) -> np.dtype:
    """Returns the NumPy dtype of a tensor; ml_dtypes.bfloat16 for bfloat16."""
    return self._entries[name].dtype

  def close(self) -> None:
    """Closes the file."""
    self._close()

  def __enter__(self) -> "TensorFile":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self.close()


def read_chunked(file: IO[bytes], offset: int, count: int, dtype: Any, label: str) -> np.ndarray:
  """Reads elements of a file into a new array [count].

  Args:
    file: open for reading.
    offset: in bytes.
    count: number of elements.
    dtype: of the elements.
    label: file and tensor, for the error message.

  Raises:
    ValueError: the file ends inside the tensor.
  """
  array = np.empty(count, dtype)
  view = array.view(np.uint8).data
  file.seek(offset)
  done = 0
  while done < len(view):
    got = file.readinto(view[done : done + _CHUNK])  # pyright: ignore[reportAttributeAccessIssue] # IO[bytes] lacks it
    if not got:
      raise ValueError(f"{label}: the file ends inside this tensor; get it again.")
    done += got
  return array
