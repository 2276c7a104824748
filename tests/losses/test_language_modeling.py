"""Losses and ranking against numpy and brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.decoding import answer_ranking
from mplug_jax.losses import language_modeling

PAD = 2
token_cross_entropy = jax.jit(language_modeling.token_cross_entropy)
soft_cross_entropy = jax.jit(language_modeling.soft_cross_entropy, static_argnums=2)


def log_softmax(x, axis=-1):
  x = x.astype(np.float64)
  return x - np.log(np.exp(x).sum(axis, keepdims=True))


@pytest.fixture(scope="module")
def case():
  """Logits of a student and a teacher [3, 5, 7], ids with 3, 0 and 1 pads at their ends."""
  rng = np.random.default_rng(0)
  ids = rng.integers(3, 7, (3, 5))
  ids[0, 2:] = PAD
  ids[2, 4:] = PAD
  return (
    rng.normal(size=(3, 5, 7)).astype(np.float32) * 3,
    rng.normal(size=(3, 5, 7)).astype(np.float32) * 3,
    ids,
  )


def test_token_cross_entropy(case):
  logits, _, ids = case
  expected = [[-log_softmax(logits)[r, t, ids[r, t]] for t in range(5)] for r in range(3)]
  np.testing.assert_allclose(token_cross_entropy(logits, ids), expected, rtol=1e-5)
  large = token_cross_entropy(np.asarray([[[1000.0, -1000.0]]], np.float32), np.asarray([[1]]))
  np.testing.assert_allclose(large, [[2000.0]])


@pytest.mark.parametrize("axis", [-1, 1])
def test_soft_cross_entropy(case, axis):
  """axis is the one the student is normalised over; the teacher always over the vocabulary."""
  student, teacher, _ = case
  expected = -(np.exp(log_softmax(teacher)) * log_softmax(student, axis)).sum(-1)
  np.testing.assert_allclose(soft_cross_entropy(student, teacher, axis), expected, rtol=1e-5)


def test_soft_cross_entropy_with_a_certain_teacher_equals_cross_entropy(case):
  student, _, ids = case
  certain = np.where(np.eye(7)[ids] > 0, 1e4, 0.0).astype(np.float32)
  np.testing.assert_allclose(
    soft_cross_entropy(student, certain, -1), token_cross_entropy(student, ids), rtol=1e-5
  )


@functools.partial(jax.jit, static_argnums=5)
def weighted_vocabulary_losses(hidden, table, bias, labels, weights, chunk):
  """Returns what `vocabulary_losses` returns, and gradients of a weighted sum of the losses."""

  def total(*arrays):
    each, right = language_modeling.vocabulary_losses(*arrays, labels, chunk)
    return (each * weights).sum(), (each, right)

  gradients, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(hidden, table, bias)
  return *out, gradients


@pytest.mark.parametrize("chunk", [0, 1, 2, 3, 5, 9])
def test_chunked_vocabulary_losses_equal_unchunked_ones(chunk):
  """Values, gradients of everything, and which words are right.

  Chunks need not divide the positions.
  """
  rng = np.random.default_rng(1)
  hidden, table, bias = (
    rng.normal(size=shape).astype(np.float32) for shape in ((3, 5, 4), (7, 4), (7,))
  )
  labels, weights = rng.integers(0, 7, (3, 5)), rng.normal(size=(3, 5)).astype(np.float32)
  logits = log_softmax(hidden @ table.T + bias)
  arrays = hidden, table, bias, labels, weights
  each, right, gradients = weighted_vocabulary_losses(*arrays, chunk)
  np.testing.assert_allclose(
    each, -np.take_along_axis(logits, labels[..., None], -1)[..., 0], rtol=1e-5
  )
  np.testing.assert_array_equal(right, logits.argmax(-1) == labels)
  assert 0 < right.sum() < right.size
  for ours, expected in zip(gradients, weighted_vocabulary_losses(*arrays, 0)[2]):
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_chunks_save_the_memory_of_the_logits():
  """In the compiled gradient, temporaries are a fraction of the logits, which are 16 MB."""
  hidden, table, bias, labels = (
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in (
      ((16, 32, 8), jnp.float32),
      ((8192, 8), jnp.float32),
      ((8192,), jnp.float32),
      ((16, 32), jnp.int32),
    )
  )

  def size(chunk):
    def loss(*args):
      return language_modeling.vocabulary_losses(*args, chunk)[0].sum()

    return (
      jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
      .lower(hidden, table, bias, labels)
      .compile()
      .memory_analysis()
      .temp_size_in_bytes
    )

  logits = 16 * 32 * 8192 * 4
  assert size(0) > logits
  assert size(4) < logits / 3


def test_next_ids():
  np.testing.assert_array_equal(
    jax.jit(language_modeling.next_ids)(np.asarray([[5, 6, 7], [8, 2, 2]])),
    [[6, 7, 0], [2, 2, 0]],
  )


@pytest.mark.parametrize(("alpha", "axis"), [(0.0, -1), (0.4, -1), (0.4, 1)])
def test_answer_cross_entropy_equals_numpy(case, alpha, axis):
  """Position t predicts token t + 1.

  The last position predicts nothing; pads do not count; a sum, not a mean.
  """
  student, teacher, ids = case
  hard, soft = log_softmax(student[:, :-1]), log_softmax(student[:, :-1], axis)
  expected = np.zeros(3)
  for r in range(3):
    for t in range(4):
      if ids[r, t + 1] != PAD:
        distilled = -(np.exp(log_softmax(teacher[r, t])) * soft[r, t]).sum()
        expected[r] += -(1 - alpha) * hard[r, t, ids[r, t + 1]] + alpha * distilled
  options = dict(teacher_logits=teacher, alpha=alpha, axis=axis) if alpha else {}
  losses = jax.jit(lambda x: language_modeling.answer_cross_entropy(x, ids, PAD, **options))
  np.testing.assert_allclose(losses(student), expected, rtol=1e-5)


def test_answer_of_padding_has_no_loss(case):
  student, teacher, _ = case
  ids = np.full((3, 5), PAD)
  value, gradient = jax.jit(
    jax.value_and_grad(
      lambda x: language_modeling.answer_cross_entropy(x, ids, PAD, teacher, 0.5).sum()
    )
  )(student)
  assert value == 0
  assert not np.any(gradient)


def test_the_teacher_gets_no_gradient(case):
  student, teacher, ids = case
  gradient = jax.jit(
    jax.grad(lambda x: language_modeling.answer_cross_entropy(student, ids, PAD, x, 0.4).sum())
  )(teacher)
  assert not np.any(gradient)


# ---- ranking


class Model:
  """A random language model whose logits depend on the row and on all ids up to a position."""

  def __init__(self, rows, vocabulary, length):
    rng = np.random.default_rng(7)
    self.table = rng.normal(size=(rows, length, vocabulary, vocabulary)).astype(np.float32) * 2

  def __call__(self, ids):
    rows = jnp.arange(ids.shape[0])[:, None, None]
    return jnp.cumsum(jnp.asarray(self.table)[rows, jnp.arange(ids.shape[2]), ids], axis=2)

  def log_probs(self, row, answer):
    """Log-probability of each token of an unpadded answer after the first, in float64."""
    sums = np.cumsum([self.table[row, t, token] for t, token in enumerate(answer)], axis=0)
    return [log_softmax(sums[t])[token] for t, token in enumerate(answer[1:])]


# [bos = 0] answer [eos = 1]; the third and fourth begin alike.
ANSWERS = [[0, 3, 1], [0, 4, 5, 1], [0, 5, 1], [0, 5, 6, 3, 1], [0, 6, 1], [0, 7, 4, 1]]


def brute_force(model, row, top_k, twice):
  first = [model.log_probs(row, answer)[0] for answer in ANSWERS]
  chosen = sorted(range(len(ANSWERS)), key=lambda n: (-first[n], n))[:top_k]
  score = {n: sum(model.log_probs(row, ANSWERS[n])) + (first[n] if twice else 0.0) for n in chosen}
  order = sorted(chosen, key=lambda n: -score[n])
  total = sum(np.exp(s) for s in score.values())
  return order, [np.exp(score[n]) / total for n in order]


@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize("top_k", [1, 3, 128])
def test_rank_equals_brute_force(twice, top_k):
  model = Model(rows=9, vocabulary=8, length=6)
  candidates = np.full((len(ANSWERS), 6), PAD, np.int32)
  for row, answer in zip(candidates, ANSWERS):
    row[: len(answer)] = answer
  ranked = jax.jit(
    lambda: answer_ranking.rank(
      model, 9, jnp.asarray(candidates), top_k=top_k, pad_id=PAD, first_token_twice=twice
    )
  )()
  assert ranked.answers.shape == (9, min(top_k, 6))
  for row in range(9):
    order, probabilities = brute_force(model, row, top_k, twice)
    assert ranked.answers[row].tolist() == order
    np.testing.assert_allclose(ranked.probabilities[row], probabilities, rtol=1e-4)
  if top_k == 3:  # the two settings disagree somewhere, so that they are told apart
    assert any(
      brute_force(model, row, 3, True)[0] != brute_force(model, row, 3, False)[0]
      for row in range(9)
    )


def test_equal_candidates_keep_their_order():
  """Two candidates that begin alike tie in the first stage, two equal ones in the second."""
  model = Model(rows=4, vocabulary=8, length=4)
  candidates = np.asarray([[0, 4, 1, PAD], [0, 3, 5, 1], [0, 4, 1, PAD], [0, 3, 6, 1]])
  ranked, first = jax.jit(
    lambda ids: [answer_ranking.rank(model, 4, ids, top_k=k, pad_id=PAD) for k in (4, 1)]
  )(candidates)
  for row in ranked.answers.tolist():
    assert row.index(0) + 1 == row.index(2)
  assert set(first.answers[:, 0].tolist()) <= {0, 1}
  np.testing.assert_allclose(first.probabilities, 1.0)
