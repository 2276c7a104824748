"""Texts as rows of token ids of one length."""

import functools
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int32

from mplug_jax.data.text.tokenizer import pad_ids
from mplug_jax.data.text.tokenizer_base import Tokenizer

_CACHED_ROWS = 1 << 16  # texts repeat every epoch, and often for many images
_WARNINGS = 10


class TokenRows:
  """Function from a text to i32[L], [bos] pieces, padded with the pad id.

  Rows are shared: copy before writing.

  Attributes:
    length: L.
    cut: number of distinct texts that were too long.
  """

  def __init__(self, tokenizer: Tokenizer, length: int, ends: bool = False):
    """Makes the function.

    Args:
      tokenizer: tokenizer of the run.
      length: L, tokens of a row.
      ends: rows end with [eos], also those of cut texts, which are then logged.
    """
    self._tokenizer = tokenizer
    self.length = length
    self._ends = ends
    self.cut = 0
    self._make_cache()

  def _make_cache(self):
    self._row = functools.lru_cache(_CACHED_ROWS)(self._make)

  def __call__(self, text: str) -> Int32[np.ndarray, " length"]:
    """Returns the row of a text.

    Args:
      text: the text.
    """
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

  def __getstate__(self) -> dict[str, Any]:
    """Without the cache, which cannot be sent to a worker process."""
    return {key: value for key, value in self.__dict__.items() if key != "_row"}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._make_cache()
