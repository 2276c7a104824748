"""CIDEr and CIDEr-D of captions (Vedantam, Zitnick and Parikh 2015).

Both compare tf-idf vectors of the n-grams (n = 1..4) of a candidate and of each reference, and are
10 times the mean over n and references. They differ in two ways:

- `Cider`: the cosine of the vectors, the paper's equation (2). No published table has it.
- `CiderD`: the paper's section 5.2, hard to game: a candidate's weight counts at most as much as
the reference's, and a Gaussian
  (sigma = 6 words) penalises a difference in length. This is what pycocoevalcap and the COCO
  leaderboard *call* "CIDEr", and what papers report under that name.

Neither stems words, which the paper does and its code does not.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mplug_jax.metrics.captioning.bleu import ngrams

_MOST = 4  # words of the longest n-grams
_SIGMA = 6.0
_SCALE = 10.0


class DocumentFrequency(NamedTuple):
  """What idf is computed from.

  Attributes:
    counts: {n-gram as a tuple of words: in how many images' references it occurs}.
    images: number of images, at least the largest count.
  """

  counts: Mapping[tuple[str, ...], float]
  images: int


def document_frequency(references: Sequence[Sequence[str]]) -> DocumentFrequency:
  """Counts over the references of a set: for each image, one caption or more, tokens separated by spaces."""
  counts = {}
  for captions in references:
    texts = [caption.split() for caption in captions]
    for gram in {gram for words in texts for n in range(1, _MOST + 1) for gram in ngrams(words, n)}:
      counts[gram] = counts.get(gram, 0) + 1
  return DocumentFrequency(counts, len(references))


class _Entries(NamedTuple):
  """The tf-idf vectors of captions for one n: an entry for each n-gram of each caption, the captions in order.

  Attributes:
    key: caption * width + n-gram, both as numbers, int64 [entries], ascending. width: number of
      n-grams.
    count: how often the caption has the n-gram, float64 [entries].
    square: idf^2 of the n-gram, float64 [entries]. A weight is count * idf.
    start: the first entry of each caption, int64 [captions + 1].
    norm: of each caption's vector, float64 [captions].
  """

  key: np.ndarray
  width: int
  count: np.ndarray
  square: np.ndarray
  start: np.ndarray
  norm: np.ndarray


class CiderD:
  """Scorer with fixed document frequencies: of the evaluated set for an evaluation, of the training captions for rewards.

  Args:
    source: references as `document_frequency` takes them, or the counts themselves.

  Raises:
    ValueError: no images, or an n-gram is in more images than there are.
  """

  def __init__(self, source: Sequence[Sequence[str]] | DocumentFrequency):
    frequency = source if isinstance(source, DocumentFrequency) else document_frequency(source)
    if frequency.images < 1:
      raise ValueError(
        "document frequencies need the references of one image at least; there are none."
      )
    largest = max(frequency.counts.values(), default=0)
    if largest > frequency.images:
      raise ValueError(
        f"document frequencies: an n-gram occurs in {largest} of {frequency.images} images; give "
        f"the number of images "
        "that were counted."
      )
    self._counts, self._images = frequency.counts, frequency.images

  def score(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Scores of candidates, each against its own references.

    The same references for several candidates cost little more than once. Where no n-gram tells
    images apart (one image alone; an empty candidate or reference) the score is 0.

    Args:
      candidates: captions, tokens separated by spaces.
      references: for each candidate, one caption or more of that form.

    Returns:
      float64 [candidates], between 0 and 10. The score of a set is their mean.

    Raises:
      ValueError: `candidates` and `references` differ in number, or a candidate has no references.
    """
    texts, pairs = {}, []  # {caption: its number}, (candidate, its number, the reference's number)
    for i, (candidate, captions) in enumerate(zip(candidates, references, strict=True)):
      if not captions:
        raise ValueError(f"candidate {i} has no references; every candidate needs one at least.")
      ours = texts.setdefault(candidate, len(texts))
      pairs += [(i, ours, texts.setdefault(caption, len(texts))) for caption in captions]
    if not pairs:
      return np.zeros(0)
    owner, ours, theirs = np.array(pairs).T
    texts = [caption.split() for caption in texts]
    total = sum(self._products(entries, ours, theirs) for entries in self._entries(texts))
    bigrams = np.array([max(0, len(words) - 1) for words in texts])
    total *= self._length_factor(bigrams[ours] - bigrams[theirs])
    return _SCALE / _MOST * np.bincount(owner, total) / np.bincount(owner)

  def _entries(self, texts) -> Iterator[_Entries]:
    """The vectors of captions, which are lists of words, for n = 1..4."""
    lengths = np.array([len(words) for words in texts])
    row, flat = (
      np.repeat(np.arange(len(texts)), lengths),
      [word for words in texts for word in words],
    )
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(
      len(flat)
    )  # words from here to the caption's end
    numbers = {}
    word = np.array([numbers.setdefault(word, len(numbers)) for word in flat], np.int64)
    gram = np.zeros_like(word)
    for n in range(1, _MOST + 1):
      # An n-gram is the (n-1)-gram at its start and one word more; at a caption's end there is
      # none.
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

  def _products(self, entries, ours, theirs):
    """Cosines, or what `_product` makes of them, of captions `ours` and `theirs`, int64 [pairs] each.

    Returns:
      float64 [pairs], 0 where a vector is 0.
    """
    sizes = entries.start[ours + 1] - entries.start[ours]
    pair = np.repeat(np.arange(len(ours)), sizes)
    mine = np.arange(len(pair)) + np.repeat(entries.start[ours] - (np.cumsum(sizes) - sizes), sizes)
    wanted = (
      entries.key[mine] + (theirs - ours)[pair] * entries.width
    )  # the same n-gram in the other caption
    other = np.minimum(np.searchsorted(entries.key, wanted), max(0, len(entries.key) - 1))
    found = entries.key[other] == wanted
    pair, mine, other = pair[found], mine[found], other[found]
    sums = np.bincount(
      pair,
      self._product(entries.count[mine], entries.count[other]) * entries.square[mine],
      len(ours),
    )
    norms = entries.norm[ours] * entries.norm[theirs]
    return np.divide(sums, norms, out=np.zeros(len(ours)), where=norms > 0)

  def _product(self, ours, theirs):
    """What two counts of an n-gram contribute, in units of idf^2."""
    return np.minimum(ours, theirs) * theirs

  def _length_factor(self, difference):
    return np.exp(-(difference**2) / (2 * _SIGMA**2))


class Cider(CiderD):
  """CIDEr without clipping and without penalty on length; see the head of this file."""

  def _product(self, ours, theirs):
    return ours * theirs

  def _length_factor(self, difference):
    return np.ones(len(difference))
