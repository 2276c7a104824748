"""ROUGE-L of captions (Lin 2004), as the COCO caption evaluation computes it."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

_BETA = 1.2  # recall counts beta^2 times as much as precision


def rouge_l(
  candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> Float[np.ndarray, " images"]:
  """Returns the F-measure of the longest common subsequence.

  It combines the best precision and the best recall over the references of an image. Captions are
  split only at spaces, so that an empty one counts as one empty word: two empty captions score 1.

  Args:
    candidates: one caption per image, tokens separated by spaces.
    references: one or more such captions per image.

  Returns:
    Scores of the images, f64, between 0 and 1. The score of a set is their mean.
  """
  scores = [
    _score(candidate.split(" "), [caption.split(" ") for caption in captions])
    for candidate, captions in zip(candidates, references, strict=True)
  ]
  return np.array(scores, np.float64)


def _score(candidate, references):
  positions = {}
  for i, word in enumerate(candidate):
    positions[word] = positions.get(word, 0) | 1 << i
  common = [_common(len(candidate), positions, words) for words in references]
  precision = max([length / len(candidate) for length in common])
  recall = max([length / len(words) for length, words in zip(common, references)])
  if not precision or not recall:
    return 0.0
  return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common(length, positions, words):
  """Returns the length of the longest common subsequence of a text and `words`.

  The rows of the usual table are the bits of one integer (Hyyrö 2004): a row rises by one at a bit
  that is 0.

  Args:
    length: words of the text.
    positions: {word: bits of its positions in the text}.
    words: the other text.
  """
  mask = (1 << length) - 1
  row = mask
  for word in words:
    matches = row & positions.get(word, 0)
    row = ((row + matches) | (row - matches)) & mask
  return length - row.bit_count()
