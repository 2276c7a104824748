"""Beam search and sampling: early exit, constraints, n-best lists and random keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.decoding import beam_search, sampling
from mplug_jax.decoding import tokens as tokens_lib
from tests.support.decoding_case import (
  EOS,
  PAD,
  ROWS,
  all_finished,
  check,
  jit,
  log_probs,
  make_cache,
  make_keys,
  make_table,
  reference_search,
  reorder_fn,
  run,
  sequences,
  standard_search,
  step_fn,
)


def test_early_exit():
  """Every step gives eos almost surely: the loop must not run to max_length = 200."""
  table, calls = make_table(0, 2, eos_bonus=30.0), []
  prompt, lengths = jnp.array([[2, 0, 0], [2, 3, 4]]), jnp.array([1, 3])
  options = {"max_length": 200, "eos_id": EOS, "pad_id": PAD}

  def counting(cache, tokens, position):
    jax.debug.callback(lambda p: calls.append(int(p)), position)
    return step_fn(cache, tokens, position)

  def positions(search):
    calls.clear()
    jax.block_until_ready(jit(search)(make_cache(table, 2)))
    jax.effects_barrier()
    return sorted(calls)

  def beam(**more):
    return positions(
      lambda cache: beam_search.beam_search(
        counting, reorder_fn, cache, prompt, lengths, beams=2, **more, **options
      )
    )

  # Prompts of 1 and 3 tokens, then one eos: positions 0 to 2.
  assert beam(mode="reference") == [0, 1, 2]
  assert beam(n_best=1) == [0, 1, 2]
  # Two results: the beams go on until a length bonus of 200 tokens cannot beat the second one.
  assert 4 <= len(beam()) <= 15
  sampled = positions(
    lambda cache: sampling.sample(
      counting, cache, prompt, lengths, make_keys(0, 2), num_samples=2, **options
    )
  )
  assert sampled == [0, 1, 2]


def test_early_stop_is_exact_for_n_best():
  """Length bonus: short stored hypotheses must not stop a beam that can win. Malus: likewise."""
  table = make_table(21, 40, eos_bonus=0.0, scale=0.7)
  for n_best, power in ((1, 3.0), (3, 3.0), (3, -2.0)):
    result = run("beam", table, [[2]] * 40, 3, max_length=9, length_penalty=power, n_best=n_best)
    for item in range(40):
      check(result, standard_search(table[item], [2], 3, 9, 0, power)[:n_best], item)


@pytest.mark.parametrize(
  ("kind", "rows", "options", "n"),
  [
    ("beam", 3, {"mode": "standard"}, 2),
    ("beam", 3, {"mode": "reference"}, 2),
    ("greedy", 1, {}, 1),
    ("greedy", 1, {}, 2),
    ("greedy", 1, {}, 3),
    ("sample", 4, {}, 2),
  ],
)
def test_no_repeat_ngram(kind, rows, options, n):
  batch, vocabulary, prompt = 10, 5, [2, 3, 2, 4]
  table = make_table(4, batch, vocabulary, eos_bonus=-4.0)
  shared = dict(max_length=8, **options)
  blocked = run(kind, table, [prompt] * batch, rows, no_repeat_ngram=n, **shared)

  def repeats(tokens):
    """Does any n-gram that ends in a generated token occur earlier?"""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return any(g in grams[:i] for i, g in enumerate(grams) if i + n > len(prompt))

  assert not any(repeats(s) for item in range(batch) for s in sequences(blocked, item))
  if kind == "greedy":
    free = run(kind, table, [prompt] * batch, rows, **shared)
    assert any(repeats(s) for item in range(batch) for s in sequences(free, item))
    for item in range(batch):
      tokens = list(prompt)
      while len(tokens) < 12 and tokens[-1] != EOS:
        order = np.argsort(-log_probs(table[item], tokens), kind="stable")
        tokens.append(next(int(v) for v in order if not repeats(tokens + [int(v)])))
      assert sequences(blocked, item) == [tokens]


def test_only_allowed_tokens_are_generated():
  table = make_table(6, 6)
  allowed = (False, True, True, False, True)
  wide = run("beam", table[:1], [[3]], 60, max_length=4, allowed=allowed)
  expected = all_finished(table[0], [3], 4, tokens=[1, 2, 4])
  assert sequences(wide)[: len(expected)] == [tokens for _, tokens in expected]
  # Without eos (grounding: a fixed number of box tokens) everything runs to max_length.
  fixed = run("greedy", table, [[3]] * 6, max_length=4, allowed=(False, False, True, False, True))
  assert (fixed.lengths == 5).all()
  assert np.isfinite(fixed.scores).all()


@pytest.mark.parametrize(
  ("kind", "rows", "options"),
  [
    ("beam", 3, {"mode": "standard"}),
    ("beam", 3, {"mode": "reference"}),
    ("sample", 3, {"top_p": 0.5}),
    ("sample", 2, {}),
  ],
)
def test_sequence_without_permitted_token_ends_with_eos(kind, rows, options):
  """Forbidden everywhere, or logits of -inf everywhere: eos, and never NaN."""
  table = make_table(7)
  for logits, expected in ((table, [3, 2, 2, EOS]), (np.full_like(table, -np.inf), [3, EOS])):
    result = run(
      kind,
      logits,
      [[3]],
      rows,
      max_length=6,
      no_repeat_ngram=2,
      allowed=(False, False, True, False, False),
      **options,
    )
    assert sequences(result)[0] == expected  # a second 2 2 is forbidden
    assert not np.isnan(result.scores).any()
  if kind == "beam":
    assert sequences(result)[1] == [3]
    assert result.scores[0, 1] == -np.inf


@pytest.mark.parametrize("mode", ["standard", "reference"])
def test_more_beams_than_tokens(mode):
  search = standard_search if mode == "standard" else reference_search
  for seed in range(3):
    table = make_table(seed, vocabulary=3)
    result = run("beam", table, [[2]], 8, max_length=3, mode=mode)
    expected = [c for c in search(table[0], [2], 8, 3, 0) if c[0] > -np.inf]
    assert sequences(result)[: len(expected)] == [tokens for _, tokens in expected]
    assert (result.scores[0, len(expected) :] == -np.inf).all()
    assert all(s == [2] for s in sequences(result)[len(expected) :])


def test_top_k_one_is_greedy_even_with_ties():
  table = np.round(make_table(10, 12))  # rounded logits tie often
  sampled = run("sample", table, [[2]] * 12, 2, max_length=6, top_k=1)
  greedy = run("greedy", table, [[2]] * 12, max_length=6, length_penalty=0.0)
  for row in range(2):
    np.testing.assert_array_equal(sampled.tokens[:, row], greedy.tokens[:, 0])
    np.testing.assert_allclose(sampled.scores[:, row], greedy.scores[:, 0], rtol=1e-5)


@pytest.mark.parametrize(
  ("options", "kept", "power"),
  [
    ({}, [0, 1, 2, 3, 4], 1.0),
    ({"temperature": 0.5}, [0, 1, 2, 3, 4], 2.0),
    ({"top_p": 0.7}, [2, 0], 1.0),
    ({"top_p": 0.71}, [2, 0, 4], 1.0),
    ({"top_k": 3, "top_p": 0.8}, [2, 0], 1.0),
    ({"allowed": (True,) * 2 + (False,) * 3}, [0, 1], 1.0),
  ],
)
def test_sampling_frequencies(options, kept, power):
  """First tokens of 4000 samples against the filtered distribution, in standard errors."""
  probability = np.array([0.25, 0.06, 0.451, 0.09, 0.149])
  table = np.tile(np.log(probability).astype(np.float32), (1, ROWS, 1))
  target = np.zeros(5)
  target[kept] = probability[kept] ** power
  target /= target.sum()
  result = run("sample", table, [[3]], 4000, max_length=2, **options)
  frequency = np.bincount(result.tokens[0, :, 1], minlength=5) / 4000
  assert (frequency[target == 0] == 0).all()
  error = np.sqrt(target * (1 - target) / 4000)
  assert (np.abs(frequency - target) <= 4.5 * error).all()
  # Scores belong to the unmodified distribution, whatever the filter.
  scores = [np.log(probability[tokens[1:]]).sum() for tokens in sequences(result)]
  np.testing.assert_allclose(result.scores[0], scores, rtol=1e-5)


def test_samples_depend_only_on_their_key_and_number():
  table = np.tile(make_table(12)[:, :1], (2, ROWS, 1))  # the same distribution everywhere
  prompts, lengths, keys = [[2, 0], [2, 3]], [1, 2], make_keys(7, 2)
  many = run("sample", table, prompts, 6, lengths, keys=keys, max_length=6)
  few = run("sample", table, prompts, 2, lengths, keys=keys, max_length=6)
  np.testing.assert_array_equal(many.tokens[:, :2], few.tokens)
  assert len({tuple(s) for s in sequences(many)}) > 1
  generated = [[s[n:] for s in sequences(many, i)] for i, n in enumerate(lengths)]
  assert generated[0] != generated[1]
  # Draws are numbered from the prompt's end: with one key, another prompt length changes nothing.
  same = run("sample", table, prompts, 6, lengths, keys=keys[np.array([0, 0])], max_length=6)
  for item, n in enumerate(lengths):
    assert [s[n:] for s in sequences(same, item)] == generated[0]


@pytest.mark.parametrize(
  ("message", "options"),
  [
    ("n_best", {"beams": 2, "n_best": 3}),
    ("beams", {"beams": 0}),
    ("mode", {"mode": "fast"}),
    ("max_length", {"max_length": 0}),
    ("min_length", {"min_length": 4}),
    ("allowed", {"allowed": np.ones(4, bool)}),
    ("prompt", {"prompt": jnp.ones((1, 0), jnp.int32)}),
  ],
)
def test_bad_beam_options(message, options):
  good = {
    "prompt": jnp.ones((1, 1), jnp.int32),
    "prompt_length": jnp.ones(1, jnp.int32),
    "beams": 1,
    "max_length": 3,
    "eos_id": EOS,
    "pad_id": PAD,
  }
  with pytest.raises(ValueError, match=message):
    beam_search.beam_search(
      step_fn, reorder_fn, make_cache(make_table(0), 1), **{**good, **options}
    )


def test_prompt_without_batch_axis_raises():
  with pytest.raises(ValueError, match="prompt"):
    tokens_lib.check_options(jnp.ones(1, jnp.int32), jnp.ones(1, jnp.int32), 3, 0, 0)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_k": -1}])
def test_bad_sample_options(options):
  with pytest.raises(ValueError, match=next(iter(options))):
    sampling.sample(
      step_fn,
      None,
      jnp.ones((1, 1), jnp.int32),
      jnp.ones(1, jnp.int32),
      make_keys(0, 1),
      num_samples=1,
      max_length=3,
      eos_id=EOS,
      pad_id=PAD,
      **options,
    )
