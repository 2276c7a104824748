"""Sources whose records carry many texts about an image -> sources of at most so many a record."""

import numpy as np


class Chunked:
  """Every text of `source` once, at most `size` of them in a record, record by record and in order.

  A record with n texts becomes ceil(n / size) records that share its image. With size 1 an epoch
  has a record for every text, as the official one; with as many as an image has, one for every
  image.

  Attributes:
    source: the source of whole records. record: i64[N], the number of each record's whole record in
      it.
  """

  def __init__(self, source, size, key, counts=None):
    """key: of the texts in a record, and the name of the method by which `source` and this tell them alone, without the image.
    counts: i64[len(source)], texts of each record, where the source knows them.
    """
    self.source, self._size, self._key = source, size, key
    if counts is None:
      counts = np.array([len(self._whole(number)) for number in range(len(source))], np.int64)
    chunks = -(-counts // size)
    self.record = np.repeat(np.arange(len(source)), chunks)
    self._first = (np.arange(len(self.record)) - np.repeat(chunks.cumsum() - chunks, chunks)) * size
    setattr(self, key, self._part)

  def __len__(self):
    return len(self.record)

  def __getitem__(self, index):
    record = self.source[int(self.record[index])]
    return {**record, self._key: self._chunk(record[self._key], index)}

  def _whole(self, number):
    """All texts of a whole record, without making its image if the source can."""
    texts = getattr(self.source, self._key, None)
    return texts(number) if texts else self.source[number][self._key]

  def _part(self, index):
    return self._chunk(self._whole(int(self.record[index])), index)

  def _chunk(self, texts, index):
    return texts[self._first[index] : self._first[index] + self._size]
