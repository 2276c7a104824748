"""Ranking by similarity and re-ranking, against whole matrices of scores.

Recall against counting.
"""

import itertools

import numpy as np
import pytest

from mplug_jax.evaluators import reranking
from mplug_jax.metrics import recall

IMAGES = 7
OWNER = np.array([0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 6])


@pytest.fixture
def features():
  rng = np.random.default_rng(0)
  return rng.normal(size=(IMAGES, 5)).astype(np.float32), rng.normal(size=(len(OWNER), 5)).astype(
    np.float32
  )


def nearest_of(features, k=3):
  images, texts = features
  numbers = np.arange(IMAGES)
  return reranking.nearest(images, texts, k, numbers, OWNER), reranking.nearest(
    texts, images, k, OWNER, numbers
  )


def test_ties_count_against_the_row():
  scores = np.array([[3, 3, 1, 0], [5, 5, 5, 5], [0, 1, 2, 3], [4, 2, 1, 0]], np.float32)
  correct = np.array([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], bool)
  np.testing.assert_array_equal(recall.ranks(scores, correct), [1, 3, np.inf, 0])


def test_recall_is_the_share_of_ranks_below_the_depth():
  out = recall.recalls(np.array([0, 4, 5, np.inf]), np.array([0.0, 1, 9, 10]))
  assert [out[f"txt_r{d}"] for d in (1, 5, 10)] == [25, 50, 75]
  assert [out[f"img_r{d}"] for d in (1, 5, 10)] == [25, 50, 75]
  assert out["txt_r_mean"] == out["img_r_mean"] == out["r_mean"] == 50


def test_chance_is_the_mean_over_all_orders():
  owner = np.array([0, 1, 1, 2, 0])
  images = 3
  by_image, by_text = (
    [[next(i for i, x in enumerate(order) if correct(x, row)) for row in rows] for order in orders]
    for orders, correct, rows in (
      (itertools.permutations(range(5)), lambda t, i: owner[t] == i, range(3)),
      (itertools.permutations(range(3)), lambda i, t: owner[t] == i, range(5)),
    )
  )
  expected = recall.recalls(np.array(by_image), np.array(by_text))["r_mean"]
  assert recall.chance(owner, images) == pytest.approx(expected)
  assert expected < 100


@pytest.mark.parametrize("block", [1, 30, 1 << 24])
def test_nearest_does_not_depend_on_the_block_size(features, block, monkeypatch):
  monkeypatch.setattr(reranking, "_BLOCK", block)
  scores = features[0] @ features[1].T
  correct = np.arange(IMAGES)[:, None] == OWNER
  for side, matrix, expected in zip(nearest_of(features), (scores, scores.T), (correct, correct.T)):
    order = np.argsort(-matrix, axis=1)[:, :3]
    np.testing.assert_array_equal(side.ids, order)
    np.testing.assert_allclose(side.scores, np.take_along_axis(matrix, order, 1), rtol=1e-5)
    best = np.where(expected, matrix, -np.inf).max(1, keepdims=True)
    np.testing.assert_array_equal(side.rank, (matrix > best).sum(1))


def test_more_candidates_than_columns_returns_all(features):
  by_image, by_text = nearest_of(features, k=256)
  assert by_image.ids.shape == (IMAGES, len(OWNER))
  assert by_text.ids.shape == (len(OWNER), IMAGES)


def test_each_pair_is_scored_once_with_those_of_its_image(features):
  by_image, by_text = nearest_of(features)
  wanted = {(i, t) for i in range(IMAGES) for t in by_image.ids[i]} | {
    (i, t) for t in range(len(OWNER)) for i in by_text.ids[t]
  }
  both = IMAGES * 3 + len(OWNER) * 3 - len(wanted)
  table = reranking.PairTable(by_image.ids, by_text.ids)
  assert len(table) == len(wanted)
  assert table.wanted - len(table) == both > 0
  order = table.order()
  calls = []
  counts = np.diff(table.start)
  assert sorted(order) == list(range(IMAGES))
  assert (np.diff(counts[order]) <= 0).all()
  assert counts.sum() == len(wanted)

  def score(memory, texts):
    calls.append((memory, texts.copy()))
    return np.where(memory[:, None] < 0, np.nan, 100.0 * memory[:, None] + texts)

  blocks = [
    np.pad(order[i : i + 3], (0, max(0, i + 3 - IMAGES)), constant_values=-1)
    for i in range(0, IMAGES, 3)
  ]
  scores = reranking.score_pairs(table, ((block, block) for block in blocks), score, width=2)
  assert {texts.shape for _, texts in calls} == {(3, 2)}  # compiled once
  assert len(calls) == sum(-(-counts[block[block >= 0]].max() // 2) for block in blocks)
  for i, t in wanted:
    assert scores[table.positions(i, t)] == 100 * i + t


def test_rerank_sorts_candidates_before_all_others(features):
  before = nearest_of(features, k=2)[0]
  rng = np.random.default_rng(1)
  scores = rng.normal(size=before.ids.shape).astype(np.float32)
  after = reranking.rerank(before, scores, np.arange(IMAGES), OWNER)
  for row in range(IMAGES):
    order = np.argsort(-scores[row])
    np.testing.assert_array_equal(after.ids[row], before.ids[row, order])
    position = [i for i, t in enumerate(after.ids[row]) if OWNER[t] == row]
    assert after.rank[row] == (position[0] if position else before.rank[row])
  assert 0 < (before.rank >= 2).sum() < IMAGES  # both kinds of rows occur


def test_recall_without_queries_is_an_error():
  with pytest.raises(ValueError, match="2 images and 0 texts; without queries"):
    recall.recalls(np.zeros(2), np.zeros(0))
  with pytest.raises(ValueError, match="0 images and 1 texts"):
    recall.recalls(np.zeros(0), np.zeros(1))


def test_images_without_texts_are_no_queries_of_chance():
  # Two texts, three images; the third has none.
  expected = 100 * np.mean([1 / 2, 1, 1, 1 / 3, 1, 1])
  assert recall.chance(np.array([0, 1]), 3) == pytest.approx(expected)
