"""Re-ranking: the most similar candidates of every query get a second score from the model that reads image and text together.

Pairs of both directions are scored image by image, so that what the model computes of an image alone is computed once, and a
pair that both directions want is scored once. Pure numpy; the model comes as functions. N images, T texts, k candidates.
"""

from typing import NamedTuple

import numpy as np

from mplug_jax.metrics import recall

_BLOCK = 1 << 24  # similarities held at a time


class Candidates(NamedTuple):
  """Of R queries: the k best columns, best first, ids i64[R, k] and scores f32[R, k]; and the rank f64[R] of the best correct one,
  see recall.ranks."""

  ids: np.ndarray
  scores: np.ndarray
  rank: np.ndarray


def nearest(queries, others, k, query_images, other_images):
  """Ranks `others` for every query by the product of their features, in blocks: never all products at once.

  Args:
    queries: f32[R, E]. others: f32[C, E]. k: how many to keep, at most C (docs/official.md item 58).
    query_images, other_images: i[R], i[C], the image that each belongs to; equal ones are correct.

  Returns:
    Candidates.
  """
  k, rows = min(k, len(others)), max(1, _BLOCK // len(others))
  parts = []
  for start in range(0, len(queries), rows):
    scores = queries[start : start + rows] @ others.T
    rank = recall.ranks(scores, query_images[start : start + rows, None] == other_images)
    ids = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    parts.append(Candidates(*_sorted(ids, np.take_along_axis(scores, ids, 1)), rank))
  return Candidates(*map(np.concatenate, zip(*parts)))


def _sorted(ids, scores):
  """Columns by falling score, equal ones by rising id."""
  order = np.lexsort((ids, -scores), axis=1)
  return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)


class PairTable:
  """The pairs that either direction wants, each once, ordered by image and text.

  Attributes:
    wanted: pairs that the two directions ask for, together. text: i64[pairs]. start: i64[N + 1], image i has pairs start[i] to
      start[i + 1].
  """

  def __init__(self, texts_of_images, images_of_texts):
    """texts_of_images: i[N, k]. images_of_texts: i[T, k]."""
    self._texts, images = len(images_of_texts), len(texts_of_images)
    first = np.arange(images)[:, None] * self._texts + texts_of_images
    second = images_of_texts * self._texts + np.arange(self._texts)[:, None]
    self.wanted = first.size + second.size
    self._keys = np.unique(np.concatenate([first.ravel(), second.ravel()]))
    image, self.text = np.divmod(self._keys, self._texts)
    self.start = np.searchsorted(image, np.arange(images + 1))

  def __len__(self):
    return len(self._keys)

  def order(self):
    """i64[N]: images with the most pairs first, so that those scored side by side end at about the same time."""
    return np.argsort(-np.diff(self.start), kind="stable")

  def positions(self, images, texts):
    """Where pairs of the table stand in it; two broadcastable arrays -> i64 of their shape."""
    return np.searchsorted(self._keys, images * self._texts + texts)


def score_pairs(table, blocks, score, width):
  """Scores every pair of a table -> f32[pairs].

  Args:
    blocks: iterable of (numbers i64[G] of images, -1 for none, memory); every image in one block.
    score: function (memory, texts i64[G, width]) -> f32[G, width], of each image with its texts.
  """
  scores = np.zeros(len(table), np.float32)
  for numbers, memory in blocks:
    first, end = table.start[numbers], np.where(numbers >= 0, table.start[numbers + 1], 0)[:, None]
    for done in range(0, int((end[:, 0] - first).max()), width):
      at = first[:, None] + done + np.arange(width)
      there = at < end
      out = score(memory, np.where(there, table.text[np.minimum(at, len(table) - 1)], 0))
      scores[at[there]] = out[there]
  return scores


def rerank(candidates, scores, query_images, other_images):
  """Candidates in the order of their new scores f32[R, k], before all others, which keep theirs. Images: see `nearest`."""
  rank = recall.ranks(scores, query_images[:, None] == other_images[candidates.ids])
  return Candidates(
    *_sorted(candidates.ids, scores), np.where(np.isfinite(rank), rank, candidates.rank)
  )
