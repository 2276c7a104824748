"""ROUGE-L of captions (Lin 2004), as the COCO caption evaluation computes it."""

from collections.abc import Sequence

import numpy as np

_BETA = 1.2  # recall counts beta^2 times as much as precision


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
  """F-measure of the longest common subsequence: the best precision and the best recall over an image's references.

  Captions are split at spaces alone, so that an empty one counts as one empty word: two empty
    captions score 1.

  Args:
    candidates: one caption per image, tokens separated by spaces.
    references: for each image, one caption or more of that form.

  Returns:
    Scores of the images, float64 [images], between 0 and 1. The score of a set is their mean.
  """
  scores = [
    _score(candidate.split(" "), [caption.split(" ") for caption in captions])
    for candidate, captions in zip(candidates, references, strict=True)
  ]
  return np.array(scores, np.float64)


def _score(candidate, references):
  places = {}
  for i, word in enumerate(candidate):
    places[word] = places.get(word, 0) | 1 << i
  common = [_common(len(candidate), places, words) for words in references]
  precision = max([length / len(candidate) for length in common])
  recall = max([length / len(words) for length, words in zip(common, references)])
  if not precision or not recall:
    return 0.0
  return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common(length, places, words):
  """Length of the longest common subsequence of a text and `words`.

  The rows of the usual table are the bits of one integer (Hyyrö 2004): a row rises by one where its
    bit is 0.

  Args:
    length: words of the text. places: {word: bits of where it stands in the text}.
  """
  mask = (1 << length) - 1
  row = mask
  for word in words:
    here = row & places.get(word, 0)
    row = ((row + here) | (row - here)) & mask
  return length - row.bit_count()
