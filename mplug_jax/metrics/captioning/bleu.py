"""BLEU-1 to BLEU-4 of captions (Papineni et al. 2002), as the COCO caption evaluation does."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

# Added to numerators and denominators, so that no count divides by zero: without a match BLEU is
# near 0, not 0.
_TINY = 1e-15
_SMALL = 1e-9


def ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
  """Returns the n-grams of a text in order, repetitions included.

  Args:
    words: the text.
    n: words of an n-gram.
  """
  return zip(*(words[i:] for i in range(n)))


def bleu(
  candidates: Sequence[str], references: Sequence[Sequence[str]], most: int = 4
) -> tuple[Float[np.ndarray, " {most}"], Float[np.ndarray, "{most} images"]]:
  """Returns BLEU-1 to BLEU-`most` of tokenized candidates.

  The reference length of an image is the one closest to the candidate's, the shorter on a tie. Over
  the whole set, matches, n-grams and lengths are summed before the division; the score of the set
  is not the mean of the images' scores. An empty candidate scores 0; an image with only empty
  references scores without brevity penalty. Without images all scores are 0.

  Args:
    candidates: one caption per image, tokens separated by spaces.
    references: one or more such captions per image.
    most: words of the longest n-grams.

  Returns:
    (scores of the set, scores of the images), f64, between 0 and 1.
  """
  total_correct = [0] * most
  total_guess = [0] * most
  total_length = 0
  total_reference = 0
  scores = np.zeros((most, len(candidates)))
  for image, (candidate, captions) in enumerate(zip(candidates, references, strict=True)):
    correct, guess, length, reference = _counts(
      candidate.split(), [caption.split() for caption in captions], most
    )
    scores[:, image] = list(_scores(correct, guess, length, reference))
    total_correct = [a + b for a, b in zip(total_correct, correct)]
    total_guess = [a + b for a, b in zip(total_guess, guess)]
    total_length += length
    total_reference += reference
  return np.array(list(_scores(total_correct, total_guess, total_length, total_reference))), scores


def _counts(candidate, references, most):
  """Counts the n-grams of one image.

  Returns:
    (matched n-grams [most], n-grams [most], words, words of the closest reference).
  """
  length = len(candidate)
  reference = min((abs(len(words) - length), len(words)) for words in references)[1]
  correct = []
  for n in range(1, most + 1):
    present = {gram for words in references for gram in ngrams(words, n)}
    matched = [gram for gram in ngrams(candidate, n) if gram in present]
    correct.append(len(matched))
    # An n-gram counts at most as often as in the reference that has it most often.
    if len(set(matched)) < len(matched):
      correct[-1] = sum(
        min(matched.count(gram), max(list(ngrams(words, n)).count(gram) for words in references))
        for gram in set(matched)
      )
  return correct, [max(0, length - n) for n in range(most)], length, reference


def _scores(correct, guess, length, reference) -> Iterator[float]:
  """Yields BLEU-1, BLEU-2, ... of summed counts."""
  ratio = (length + _TINY) / (reference + _SMALL)
  penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
  product = 1.0
  for n, (matches, total) in enumerate(zip(correct, guess), start=1):
    product *= (matches + _TINY) / (total + _SMALL)
    yield product ** (1 / n) * penalty
