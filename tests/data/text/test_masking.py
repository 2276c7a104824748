"""Masked language modeling: chosen tokens and their replacements."""

import numpy as np

from mplug_jax.data.text.masking import mask_tokens

PAD = 0
BOS = 2
MASK = 4
VOCAB = 50
ROW = np.array([BOS, 10, 11, 12, 13, 14, PAD, PAD], np.int32)
WORDS = np.array([-1, 0, 1, 1, 2, 2, -1, -1], np.int32)


def draws(count, **options):
  rng = np.random.default_rng(0)
  options = {"probability": 0.15, "whole_words": False} | options
  return [
    mask_tokens(ROW, WORDS, rng, vocab_size=VOCAB, mask_id=MASK, pad_id=PAD, **options)
    for _ in range(count)
  ]


def test_shares_of_chosen_masked_random_and_kept_tokens():
  read, labels = map(np.array, zip(*draws(20000)))
  chosen = labels != PAD
  row = np.broadcast_to(ROW, labels.shape)
  assert (labels[chosen] == row[chosen]).all()
  assert (read[~chosen] == row[~chosen]).all()
  np.testing.assert_allclose(chosen.mean(0), [0, *[0.15] * 5, 0, 0], atol=0.01)
  masked = (read == MASK)[chosen]
  kept = (read == ROW)[chosen]
  np.testing.assert_allclose(
    [masked.mean(), kept.mean()], [0.8 + 0.1 / VOCAB, 0.1 + 0.1 / VOCAB], atol=0.012
  )
  others = read[chosen][~masked & ~kept]
  assert set(range(VOCAB)) - set(others.tolist()) <= {MASK}


def test_whole_words_are_chosen_together():
  labels = np.array([labels for _, labels in draws(2000, whole_words=True, probability=0.5)])
  chosen = labels != PAD
  assert (chosen[:, 2] == chosen[:, 3]).all()
  assert (chosen[:, 4] == chosen[:, 5]).all()
  assert not chosen[:, [0, 6, 7]].any()
  np.testing.assert_allclose(chosen[:, 1:6].mean(0), 0.5, atol=0.04)
  pieces = np.array([labels for _, labels in draws(2000, probability=0.5)]) != PAD
  assert (pieces[:, 2] != pieces[:, 3]).mean() > 0.4


def test_probabilities_0_and_1():
  for probability, expected in ((0.0, np.zeros(8)), (1.0, ROW * (WORDS >= 0))):
    for _, labels in draws(5, probability=probability):
      np.testing.assert_array_equal(labels, expected)
