"""Rewards of generated captions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from mplug_jax.metrics import captioning


class Rewards:
  """CIDEr-D of candidates against the captions of their image.

  Document frequencies are those of all training captions. Captions without a word are none.
  """

  def __init__(self, source: Any):
    """Tokenizes all captions.

    Args:
      source: training records, see data/sources/chunked.py.

    Raises:
      ValueError: no image has a caption, or no n-gram of the captions tells images apart, so that
        every reward would be 0.
    """
    self._image = source.record
    images = source.source
    counts = images.counts()
    tokens = captioning.tokenize([text for i in range(len(images)) for text in images.captions(i)])
    ends = counts.cumsum()
    references = {i: tokens[end - counts[i] : end] for i, end in enumerate(ends)}
    self._references, notes = captioning.without_empty(references, lambda i: images[i]["image_id"])
    for sentence in notes:
      logging.warning("Training data: %s", sentence)
    groups = list(self._references.values())
    if note := captioning.cider_note(self._references):
      raise ValueError(f"Rewards of the training captions: {note} Check the captions.")
    self._metric = captioning.CiderD(groups)

  def __call__(
    self, candidates: Sequence[Sequence[str]], indices: Sequence[int]
  ) -> list[np.ndarray]:
    """Scores candidates.

    Args:
      candidates: texts of each row.
      indices: record number of each row.

    Returns:
      Rewards f32[texts of the row] from 0 to 10, for each row; NaN for an image without references.
    """
    # One by one: the following text can change the tokens of the last word.
    tokens = [captioning.tokenize([text])[0] for texts in candidates for text in texts]
    references = [
      self._references.get(int(self._image[index]))
      for texts, index in zip(candidates, indices)
      for _ in texts
    ]
    scores = np.full(len(tokens), np.nan, np.float32)
    scored = [i for i, captions in enumerate(references) if captions]
    scores[scored] = self._metric.score(
      [tokens[i] for i in scored], [captions for captions in references if captions]
    )
    return np.split(
      np.asarray(scores, np.float32), np.cumsum([len(texts) for texts in candidates])[:-1]
    )
