"""Limits the number of texts in a record of a source."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from mplug_jax.data.sources.source import Record, Source


class Chunked:
  """Every text of a source once, at most `size` of them in a record, in order.

  A record with n texts becomes ceil(n / size) records that share its image. With size 1 an epoch
  has a record for every text, as the official one; with the number of texts of an image, one for
  every image.

  Attributes:
    source: the source of whole records.
    record: the number in `source` of each record.
  """

  source: Source
  record: Int[np.ndarray, "records"]
  # The method named `key`.
  captions: Callable[[int], list[str]]
  questions: Callable[[int], list[Record]]
  expressions: Callable[[int], list[Record]]

  def __init__(
    self,
    source: Source,
    size: int,
    key: str,
    counts: Int[np.ndarray, "whole_records"] | None = None,
  ):
    """Makes the source.

    Args:
      source: the source of whole records.
      size: texts in a record, at most.
      key: key of the texts in a record, and name of the method by which `source` and this source
        return them without the image.
      counts: texts of each whole record, if the source knows them.
    """
    self.source = source
    self._size = size
    self._key = key
    if counts is None:
      counts = np.array([len(self._all_texts(number)) for number in range(len(source))], np.int64)
    chunks = -(-counts // size)
    self.record = np.repeat(np.arange(len(source)), chunks)
    self._first = (np.arange(len(self.record)) - np.repeat(chunks.cumsum() - chunks, chunks)) * size
    setattr(self, key, self._texts)

  def __len__(self) -> int:
    return len(self.record)

  def __getitem__(self, index: int) -> Record:
    record = self.source[int(self.record[index])]
    return {**record, self._key: self._chunk(record[self._key], index)}

  def _all_texts(self, number: int) -> list[Any]:
    """Returns all texts of a whole record, without making its image if the source can."""
    texts = getattr(self.source, self._key, None)
    return texts(number) if texts else self.source[number][self._key]

  def _texts(self, index: int) -> list[Any]:
    """Returns the texts of a record, without its image."""
    return self._chunk(self._all_texts(int(self.record[index])), index)

  def _chunk(self, texts: list[Any], index: int) -> list[Any]:
    return texts[self._first[index] : self._first[index] + self._size]
