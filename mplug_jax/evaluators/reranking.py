"""Re-ranking: a model that reads image and text together scores the best candidates of each query.

Pairs of both directions are scored image by image: computations on the image alone are done once,
and a pair of both directions is scored once. The model is passed in as functions of numpy arrays.
Shapes: N images, T texts, k candidates.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from mplug_jax.metrics import recall

_BLOCK = 1 << 24  # Similarities in memory at a time.


class Candidates(NamedTuple):
  """Best columns of R queries.

  Attributes:
    ids: i64[R, k], best first.
    scores: f32[R, k].
    rank: f64[R], rank of the best correct column, see recall.ranks.
  """

  ids: np.ndarray
  scores: np.ndarray
  rank: np.ndarray


def nearest(
  queries: np.ndarray,
  others: np.ndarray,
  k: int,
  query_images: np.ndarray,
  other_images: np.ndarray,
) -> Candidates:
  """Ranks `others` for every query by the product of features, in blocks of queries.

  Args:
    queries: f32[R, E].
    others: f32[C, E].
    k: candidates to keep, at most C (docs/official.md item 58).
    query_images: i[R], image of each query.
    other_images: i[C], image of each column; the same image is correct.
  """
  k = min(k, len(others))
  rows = max(1, _BLOCK // len(others))
  parts = []
  for start in range(0, len(queries), rows):
    scores = queries[start : start + rows] @ others.T
    rank = recall.ranks(scores, query_images[start : start + rows, None] == other_images)
    ids = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    parts.append(Candidates(*_sorted(ids, np.take_along_axis(scores, ids, 1)), rank))
  return Candidates(*map(np.concatenate, zip(*parts)))


def _sorted(ids: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Sorts columns by falling score, then by rising id."""
  order = np.lexsort((ids, -scores), axis=1)
  return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)


class PairTable:
  """Pairs of both directions without duplicates, ordered by image and text.

  Attributes:
    wanted: number of pairs of both directions, duplicates included.
    text: i64[pairs], text of each pair.
    start: i64[N + 1]; image i has pairs start[i] to start[i + 1].
  """

  def __init__(self, texts_of_images: np.ndarray, images_of_texts: np.ndarray):
    """Merges candidates.

    Args:
      texts_of_images: i[N, k].
      images_of_texts: i[T, k].
    """
    self._texts = len(images_of_texts)
    images = len(texts_of_images)
    first = np.arange(images)[:, None] * self._texts + texts_of_images
    second = images_of_texts * self._texts + np.arange(self._texts)[:, None]
    self.wanted = first.size + second.size
    self._keys = np.unique(np.concatenate([first.ravel(), second.ravel()]))
    image, self.text = np.divmod(self._keys, self._texts)
    self.start = np.searchsorted(image, np.arange(images + 1))

  def __len__(self) -> int:
    return len(self._keys)

  def order(self) -> np.ndarray:
    """Returns images i64[N], most pairs first: images of a batch then need about equal time."""
    return np.argsort(-np.diff(self.start), kind="stable")

  def positions(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Returns the indices i64[...] of pairs.

    Args:
      images: numbers of the images.
      texts: numbers of the texts, broadcastable to `images`.
    """
    return np.searchsorted(self._keys, images * self._texts + texts)


def score_pairs(
  table: PairTable,
  blocks: Iterable[tuple[np.ndarray, Any]],
  score: Callable[[Any, np.ndarray], np.ndarray],
  width: int,
) -> np.ndarray:
  """Scores every pair of a table.

  Args:
    table: the pairs.
    blocks: (numbers i64[G] of images, -1 for padding; their memory), every image in one block.
    score: function (memory, texts i64[G, width]) -> f32[G, width].
    width: texts per image and call.

  Returns:
    f32[pairs].
  """
  scores = np.zeros(len(table), np.float32)
  for numbers, memory in blocks:
    first = table.start[numbers]
    end = np.where(numbers >= 0, table.start[numbers + 1], 0)[:, None]
    for done in range(0, int((end[:, 0] - first).max()), width):
      at = first[:, None] + done + np.arange(width)
      valid = at < end
      out = score(memory, np.where(valid, table.text[np.minimum(at, len(table) - 1)], 0))
      scores[at[valid]] = out[valid]
  return scores


def rerank(
  candidates: Candidates,
  scores: np.ndarray,
  query_images: np.ndarray,
  other_images: np.ndarray,
) -> Candidates:
  """Sorts candidates by new scores; columns that are no candidates keep their rank.

  Args:
    candidates: see `nearest`.
    scores: f32[R, k].
    query_images: see `nearest`.
    other_images: see `nearest`.
  """
  rank = recall.ranks(scores, query_images[:, None] == other_images[candidates.ids])
  return Candidates(
    *_sorted(candidates.ids, scores), np.where(np.isfinite(rank), rank, candidates.rank)
  )
