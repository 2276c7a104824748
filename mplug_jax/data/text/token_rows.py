"""Texts as rows of token ids of one length."""

import functools

from absl import logging

from mplug_jax.data.text.tokenizer import pad_ids

_CACHED_ROWS = 1 << 16  # the same texts come back epoch after epoch, often for many images
_WARNINGS = 10


class TokenRows:
  """Text -> i32[L], [bos] pieces, padded with the pad id. Rows are shared: copy before writing.

  Args:
    tokenizer: see tokenizer.py.
    length: L.
    ends: the row ends with [eos], also where the text has to be cut; cut texts are then warned
      about.

  Attributes:
    cut: texts that were too long, counted when they are first seen.
  """

  def __init__(self, tokenizer, length, ends=False):
    self._tokenizer, self.length, self._ends = tokenizer, length, ends
    self.cut = 0
    self._make_cache()

  def _make_cache(self):
    self._row = functools.lru_cache(_CACHED_ROWS)(self._make)

  def __call__(self, text):
    return self._row(text)

  def _make(self, text):
    ids = self._tokenizer.encode(text)
    if len(ids) + (self._ends and ids[-1] != self._tokenizer.eos_id) > self.length:
      self.cut += 1
      if self._ends and self.cut <= _WARNINGS:
        logging.warning("%r has %d tokens; it is cut to %d.", text, len(ids), self.length)
    row = pad_ids(
      [ids],
      self.length,
      self._tokenizer.pad_id,
      truncate=True,
      ensure_eos=self._tokenizer.eos_id if self._ends else None,
    )[0]
    row.flags.writeable = False
    return row

  def __getstate__(self):
    """Without the cache, which cannot be sent to a worker process."""
    return {key: value for key, value in self.__dict__.items() if key != "_row"}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._make_cache()
