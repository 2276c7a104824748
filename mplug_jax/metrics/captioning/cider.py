"""CIDEr and CIDEr-D of captions (Vedantam, Zitnick and Parikh 2015).

Both compare tf-idf vectors of the n-grams (n = 1..4) of a candidate and of each reference, and are
10 times the mean over n and references. They differ in two ways:

- `Cider`: the cosine of the vectors, the paper's equation (2). No published table has it.
- `CiderD`: the paper's section 5.2, hard to game: a candidate's weight counts at most as much as
  the reference's, and a Gaussian (sigma = 6 words) penalizes a difference in length.
  pycocoevalcap, the COCO leaderboard and papers *call* this metric "CIDEr".

Neither stems words, as the paper's code; the paper's text does.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from mplug_jax.metrics.captioning.bleu import ngrams

_MOST = 4  # words of the longest n-grams
_SIGMA = 6.0
_SCALE = 10.0


class DocumentFrequency(NamedTuple):
  """Counts from which idf is computed.

  Attributes:
    counts: {n-gram as a tuple of words: number of images with the n-gram in their references}.
    images: number of images, at least the largest count.
  """

  counts: Mapping[tuple[str, ...], float]
  images: int


def document_frequency(references: Sequence[Sequence[str]]) -> DocumentFrequency:
  """Counts n-grams over the references of a set.

  Args:
    references: one or more captions per image, tokens separated by spaces.
  """
  counts = {}
  for captions in references:
    texts = [caption.split() for caption in captions]
    for gram in {gram for words in texts for n in range(1, _MOST + 1) for gram in ngrams(words, n)}:
      counts[gram] = counts.get(gram, 0) + 1
  return DocumentFrequency(counts, len(references))


class _Entries(NamedTuple):
  """The tf-idf vectors of captions for one n: one entry per n-gram of a caption.

  The captions are in order.

  Attributes:
    key: caption * width + n-gram, both as numbers, i64[entries], ascending.
    width: number of n-grams.
    count: number of times the caption has the n-gram, f64[entries].
    square: idf^2 of the n-gram, f64[entries]. A weight is count * idf.
    start: first entry of each caption, i64[captions + 1].
    norm: norm of each caption's vector, f64[captions].
  """

  key: np.ndarray
  width: int
  count: np.ndarray
  square: np.ndarray
  start: np.ndarray
  norm: np.ndarray


class CiderD:
  """Scorer with fixed document frequencies.

  An evaluation uses the frequencies of the evaluated set, rewards those of the training captions.
  """

  def __init__(self, source: Sequence[Sequence[str]] | DocumentFrequency):
    """Sets the document frequencies.

    Args:
      source: references as `document_frequency` takes them, or the counts themselves.

    Raises:
      ValueError: no images, or an n-gram is in more images than there are.
    """
    frequency = source if isinstance(source, DocumentFrequency) else document_frequency(source)
    if frequency.images < 1:
      raise ValueError(
        "document frequencies need the references of at least one image; there are none."
      )
    largest = max(frequency.counts.values(), default=0)
    if largest > frequency.images:
      raise ValueError(
        f"document frequencies: an n-gram occurs in {largest} of {frequency.images} images; give "
        f"the number of images that were counted."
      )
    self._counts = frequency.counts
    self._images = frequency.images

  def score(
    self, candidates: Sequence[str], references: Sequence[Sequence[str]]
  ) -> Float[np.ndarray, " candidates"]:
    """Scores candidates, each against its references.

    Several candidates with the same references cost little more than one. If no n-gram
    distinguishes images (one image alone; an empty candidate or reference) the score is 0.

    Args:
      candidates: captions, tokens separated by spaces.
      references: one or more such captions per candidate.

    Returns:
      Scores, f64, between 0 and 10. The score of a set is their mean.

    Raises:
      ValueError: `candidates` and `references` differ in number, or a candidate has no references.
    """
    numbers: dict[str, int] = {}  # caption -> its number
    pairs = []  # (candidate, its caption's number, the reference's number)
    for i, (candidate, captions) in enumerate(zip(candidates, references, strict=True)):
      if not captions:
        raise ValueError(f"candidate {i} has no references; every candidate needs at least one.")
      number = numbers.setdefault(candidate, len(numbers))
      pairs += [(i, number, numbers.setdefault(caption, len(numbers))) for caption in captions]
    if not pairs:
      return np.zeros(0)
    owner, candidate_ids, reference_ids = np.array(pairs).T
    texts = [caption.split() for caption in numbers]
    total = np.zeros(len(pairs))
    for entries in self._entries(texts):
      total += self._products(entries, candidate_ids, reference_ids)
    bigrams = np.array([max(0, len(words) - 1) for words in texts])
    total *= self._length_factor(bigrams[candidate_ids] - bigrams[reference_ids])
    return _SCALE / _MOST * np.bincount(owner, total) / np.bincount(owner)

  def _entries(self, texts) -> Iterator[_Entries]:
    """Yields the vectors of captions, which are lists of words, for n = 1..4."""
    lengths = np.array([len(words) for words in texts])
    row = np.repeat(np.arange(len(texts)), lengths)
    flat = [word for words in texts for word in words]
    # Number of words from each word to the end of its caption.
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(flat))
    numbers = {}
    word = np.array([numbers.setdefault(word, len(numbers)) for word in flat], np.int64)
    gram = np.zeros_like(word)
    for n in range(1, _MOST + 1):
      # An n-gram is the (n-1)-gram at its start and the next word of the caption.
      begin = np.flatnonzero(left >= n)
      _, first, inverse = np.unique(
        gram[begin] * len(numbers) + word[begin + n - 1], return_index=True, return_inverse=True
      )
      gram[begin] = inverse
      counts = [self._counts.get(tuple(flat[at : at + n]), 0) for at in begin[first].tolist()]
      square = (math.log(self._images) - np.log(np.maximum(1.0, np.array(counts, np.float64)))) ** 2
      width = max(1, len(first))
      key, count = np.unique(row[begin] * width + inverse, return_counts=True)
      square = square[key % width]
      start = np.searchsorted(key, np.arange(len(texts) + 1) * width)
      norm = np.sqrt(np.bincount(key // width, count**2 * square, len(texts)))
      yield _Entries(key, width, count.astype(np.float64), square, start, norm)

  def _products(self, entries, candidates, references):
    """Returns the similarity of pairs of captions for one n.

    Args:
      entries: vectors of all captions.
      candidates: numbers of the captions, i64[pairs].
      references: numbers of the captions, i64[pairs].

    Returns:
      f64[pairs], 0 for pairs with an empty vector.
    """
    first = entries.start[candidates]
    sizes = entries.start[candidates + 1] - first
    pair = np.repeat(np.arange(len(candidates)), sizes)
    entry = np.arange(len(pair)) + np.repeat(first - (np.cumsum(sizes) - sizes), sizes)
    # Keys of the same n-grams in the references.
    wanted = entries.key[entry] + (references - candidates)[pair] * entries.width
    other = np.minimum(np.searchsorted(entries.key, wanted), max(0, len(entries.key) - 1))
    shared = entries.key[other] == wanted
    pair = pair[shared]
    entry = entry[shared]
    other = other[shared]
    products = self._product(entries.count[entry], entries.count[other]) * entries.square[entry]
    sums = np.bincount(pair, products, len(candidates))
    norms = entries.norm[candidates] * entries.norm[references]
    return np.divide(sums, norms, out=np.zeros(len(candidates)), where=norms > 0)

  def _product(self, candidate, reference):
    """Returns the contribution of two counts of an n-gram, in units of idf^2."""
    return np.minimum(candidate, reference) * reference

  def _length_factor(self, difference):
    return np.exp(-(difference**2) / (2 * _SIGMA**2))


class Cider(CiderD):
  """CIDEr without clipping and without a penalty on length; see the top of this file."""

  def _product(self, candidate, reference):
    return candidate * reference

  def _length_factor(self, difference):
    return np.ones(len(difference))
