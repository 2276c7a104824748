"""The interfaces of sources: random access to the records of one split."""

from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

Record = dict[str, Any]


class Source(Protocol):
  """Records of one split, by number."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Record: ...


class ImageSource(Source, Protocol):
  """Images, each once, with all their captions."""

  def captions(self, index: int, /) -> list[str]:
    """Returns the captions of an image, without its pixels."""
    ...

  def counts(self) -> Int[np.ndarray, "images"]:
    """Returns the number of captions of every image."""
    ...

  def group(self, index: int, /) -> str | None:
    """Returns the subset, scored separately, that an image belongs to; None without subsets."""
    ...


class StatementSource(Source, Protocol):
  """Sentences about one or two images, with labels."""

  def row(self, index: int, /) -> Record:
    """Returns a record without its images."""
    ...

  def groups(self, index: int, /) -> tuple[str, ...]:
    """Returns the names of the subsets that a record belongs to."""
    ...


class ExpressionSource(Source, Protocol):
  """Images with referring expressions."""

  def expressions(self, index: int, /) -> list[Record]:
    """Returns the expressions of a record, without its pixels."""
    ...
