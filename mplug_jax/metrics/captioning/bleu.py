"""BLEU-1 to BLEU-4 of captions (Papineni et al. 2002), as the COCO caption evaluation computes it."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

# Added to numerators and denominators, so that no count divides by zero: without a match BLEU is
# near 0, not 0.
_TINY, _SMALL = 1e-15, 1e-9


def ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
  """The n-grams of a text in order, repetitions included."""
  return zip(*(words[i:] for i in range(n)))


def bleu(
  candidates: Sequence[str], references: Sequence[Sequence[str]], most: int = 4
) -> tuple[np.ndarray, np.ndarray]:
  """BLEU-1 to BLEU-`most` of candidates that are tokenized.

  The reference length of an image is the one closest to the candidate's, the shorter on a tie. Over
  the whole set, matches, n-grams and lengths are summed before anything is divided; the score of
  the set is not the mean of the images' scores. An empty candidate scores 0; an image whose
  references are all empty scores without brevity penalty. Without images everything is 0.

  Args:
    candidates: one caption per image, tokens separated by spaces.
    references: for each image, one caption or more of that form.

  Returns:
    (scores of the set, float64 [most]; scores of the images, float64 [most, images]), between 0 and
    1.
  """
  total_correct, total_guess, total_length, total_reference = [0] * most, [0] * most, 0, 0
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
  """-> (matched n-grams [most], n-grams [most], words, words of the closest reference) of one image."""
  length = len(candidate)
  reference = min((abs(len(words) - length), len(words)) for words in references)[1]
  correct = []
  for n in range(1, most + 1):
    present = {gram for words in references for gram in ngrams(words, n)}
    ours = list(ngrams(candidate, n))
    matched = [gram for gram in ours if gram in present]
    correct.append(len(matched))
    if len(set(matched)) < len(
      matched
    ):  # no n-gram counts more often than in the reference that has it most often
      correct[-1] = sum(
        min(matched.count(gram), max(list(ngrams(words, n)).count(gram) for words in references))
        for gram in set(matched)
      )
  return correct, [max(0, length - n) for n in range(most)], length, reference


def _scores(correct, guess, length, reference) -> Iterator[float]:
  ratio = (length + _TINY) / (reference + _SMALL)
  penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
  product = 1.0
  for n, (matches, total) in enumerate(zip(correct, guess), start=1):
    product *= (matches + _TINY) / (total + _SMALL)
    yield product ** (1 / n) * penalty
