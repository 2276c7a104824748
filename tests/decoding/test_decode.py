"""Decoding against brute force and against plain Python restatements of both beam searches."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.decoding import beam_search, sampling
from mplug_jax.decoding import tokens as tokens_lib

VOCABULARY, EOS, PAD, ROWS = 5, 1, 0, 97


def _mix(state, token, position):
  """Hash of a prefix: the toy model's whole memory, so a wrong reorder or position changes it."""
  return (state * 31 + token * 17 + position * 7 + 3) % ROWS


def step_fn(cache, tokens, position):
  state = _mix(cache["state"], tokens, position)
  logits = jnp.take_along_axis(cache["table"], state[:, :, None], axis=1)
  return logits, {**cache, "state": state}


def reorder_fn(cache, parents):
  return {**cache, "state": jnp.take_along_axis(cache["state"], parents, axis=1)}


def make_cache(table, rows):
  return {"table": jnp.asarray(table), "state": jnp.zeros((len(table), rows), jnp.int32)}


def make_table(seed, batch=1, vocabulary=VOCABULARY, eos_bonus=0.0, scale=1.5):
  table = np.random.default_rng(seed).normal(size=(batch, ROWS, vocabulary)) * scale
  table[:, :, EOS] += eos_bonus
  return table.astype(np.float32)


def make_keys(seed, count):
  """key[count]; from numpy, because splitting a key compiles a program per count."""
  data = np.random.default_rng(seed).integers(0, 2**32, (count, 2), np.uint32)
  return jax.random.wrap_key_data(data)


def log_probs(table, prefix):
  """log P(next token | prefix) of one item's table, in float64."""
  state = 0
  for position, token in enumerate(prefix):
    state = _mix(state, token, position)
  row = table[state].astype(np.float64)
  with np.errstate(divide="ignore"):
    return row - np.log(np.exp(row).sum())


# Many small programs, each run once or twice: compile time is all that counts here.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def _jitted(kind, batch, rows, options):
  options = dict(options)
  if "allowed" in options:
    options["allowed"] = np.array(options["allowed"])
  if kind == "beam":
    fn = functools.partial(beam_search.beam_search, step_fn, reorder_fn, beams=rows)
  elif kind == "greedy":
    fn = functools.partial(beam_search.greedy, step_fn)
  else:
    fn = functools.partial(sampling.sample, step_fn, num_samples=rows)
  return _jit(functools.partial(fn, eos_id=EOS, pad_id=PAD, **options))


def run(kind, table, prompt, rows=1, lengths=None, keys=None, **options):
  """Decodes with the toy model; tokens, lengths and scores as numpy arrays."""
  prompt = np.array(prompt, np.int32)
  lengths = np.array([prompt.shape[1]] * len(prompt) if lengths is None else lengths, np.int32)
  fn = _jitted(kind, len(prompt), rows, tuple(sorted(options.items())))
  extra = () if kind != "sample" else (make_keys(0, len(prompt)) if keys is None else keys,)
  result = fn(make_cache(table, rows), jnp.asarray(prompt), jnp.asarray(lengths), *extra)
  return tokens_lib.Generation(*map(np.asarray, result))


def sequences(result, item=0):
  """The token lists of one item, cut to their lengths; what lies beyond must be padding."""
  pairs = list(zip(result.tokens[item], result.lengths[item], strict=True))
  assert all((tokens[length:] == PAD).all() for tokens, length in pairs)
  return [tokens[:length].tolist() for tokens, length in pairs]


def penalty(generated, power=0.6):
  return ((5 + generated) / 6) ** power


def reference_search(table, prompt, beams, max_length, min_length, power=0.6):
  """docs/official.md item 30 with lists; hypotheses of probability 0 are left out."""
  alive, stored = [(list(prompt), 0.0)], []
  for s in range(max_length):
    candidates = []
    for tokens, cumulated in alive:
      row = log_probs(table, tokens)
      if s < min_length:
        row[EOS] = -1e20
      candidates += [
        ((cumulated + row[v]) / penalty(s + 1, power), tokens + [v]) for v in range(len(row))
      ]
    candidates.sort(key=lambda c: -c[0])
    alive = [(tokens, score * penalty(s + 1, power)) for score, tokens in candidates[:beams]]
    if candidates[0][1][-1] == EOS or s + 1 == max_length:
      stored += candidates[:beams]
      break
    stored += [c for c in candidates[:beams] if c[1][-1] == EOS]
  stored.sort(key=lambda c: -c[0])
  return stored[:beams]


def standard_search(table, prompt, beams, max_length, min_length, power=0.6):
  """Finished beams leave; no early stop, which also shows that the early stop is safe."""
  alive, stored = [(0.0, list(prompt))], []
  for s in range(max_length):
    candidates = []
    for cumulated, tokens in alive:
      row = log_probs(table, tokens)
      candidates += [
        (cumulated + row[v], tokens + [v]) for v in range(len(row)) if v != EOS or s >= min_length
      ]
    candidates = sorted(candidates, key=lambda c: -c[0])[: 2 * beams]
    stored += [(c[0] / penalty(s + 1, power), c[1]) for c in candidates if c[1][-1] == EOS]
    alive = [c for c in candidates if c[1][-1] != EOS][:beams]
  stored = sorted(stored, key=lambda c: -c[0])[:beams]
  unfinished = [(c[0] / penalty(max_length, power), c[1]) for c in alive]
  return (stored + unfinished)[:beams]


def all_finished(table, prompt, max_length, min_length=0, power=0.6, tokens=range(VOCABULARY)):
  """Every sequence that ends with eos within max_length, best first."""
  found = []
  others = [v for v in tokens if v != EOS]
  for length in range(max(1, min_length + 1), max_length + 1):
    for body in itertools.product(others, repeat=length - 1):
      sequence = list(prompt) + list(body) + [EOS]
      total = sum(
        log_probs(table, sequence[:i])[sequence[i]] for i in range(len(prompt), len(sequence))
      )
      found.append((total / penalty(length, power), sequence))
  return sorted(found, key=lambda c: -c[0])


def check(result, expected, item=0):
  assert sequences(result, item) == [tokens for _, tokens in expected]
  np.testing.assert_allclose(result.scores[item], [score for score, _ in expected], rtol=2e-5)


@pytest.mark.parametrize(("min_length", "power"), [(0, 0.6), (2, 0.0), (1, -1.0)])
def test_wide_beam_is_brute_force(min_length, power):
  for seed in range(2):
    table, prompt = make_table(seed), [2, 3]
    expected = all_finished(table[0], prompt, 4, min_length, power)
    result = run(
      "beam", table, [prompt], 341, max_length=4, min_length=min_length, length_penalty=power
    )
    found = len(expected)
    assert sequences(result)[:found] == [tokens for _, tokens in expected]
    np.testing.assert_allclose(result.scores[0, :found], [c[0] for c in expected], rtol=2e-5)
    # The places left over hold the unfinished sequences, then bare prompts.
    unfinished = sequences(result)[found : found + 256]
    assert all(EOS not in s and len(s) == 6 for s in unfinished)
    assert len(set(map(tuple, unfinished))) == min(256, 341 - found)
    assert (np.diff(result.scores[0, found : found + 256]) <= 0).all()


@pytest.mark.parametrize("mode", ["standard", "reference"])
@pytest.mark.parametrize(("beams", "max_length", "min_length"), [(3, 8, 0), (5, 7, 4), (4, 1, 0)])
def test_beam_search_equals_plain_python(mode, beams, max_length, min_length):
  search = standard_search if mode == "standard" else reference_search
  batch, vocabulary = 30, 7
  for eos_bonus in (-1.0, 1.0):
    table = make_table(11, batch, vocabulary, eos_bonus)
    result = run(
      "beam", table, [[3]] * batch, beams, max_length=max_length, min_length=min_length, mode=mode
    )
    for item in range(batch):
      check(result, search(table[item], [3], beams, max_length, min_length), item)
  if mode == "reference" and max_length > 1:  # the quirk of this mode did occur
    found = [s for item in range(batch) for s in sequences(result, item)]
    assert any(s[-2:] == [EOS, EOS] for s in found)


def test_reference_mode_extends_finished_beams():
  """The best beam goes on, the second ends at once and comes back as eos eos."""
  table = np.full((1, ROWS, VOCABULARY), -20.0, np.float32)
  start = _mix(0, 2, 0)
  table[0, start, [3, EOS]] = np.log([0.6, 0.4])
  table[0, _mix(start, 3, 1), [3, 4]] = np.log([0.9, 0.1])
  table[0, _mix(start, EOS, 1), EOS] = 0.0
  table[0, _mix(_mix(start, 3, 1), 3, 2), [EOS]] = 0.0
  table[0, _mix(_mix(start, EOS, 1), EOS, 2), [EOS]] = 0.0
  result = run("beam", table, [[2]], 3, max_length=5, mode="reference")
  check(result, reference_search(table[0], [2], 3, 5, 0))
  assert sequences(result) == [[2, 3, 3, EOS], [2, EOS, EOS, EOS], [2, EOS, EOS]]
  standard = run("beam", table, [[2]], 3, max_length=5)
  assert [2, EOS] in sequences(standard)
  assert all(s.count(EOS) <= 1 for s in sequences(standard))


@pytest.mark.parametrize("mode", ["standard", "reference"])
def test_one_beam_is_greedy(mode):
  table = make_table(5, 20)
  greedy = run("greedy", table, [[2]] * 20, max_length=7, min_length=1)
  beam = run("beam", table, [[2]] * 20, 1, mode=mode, max_length=7, min_length=1)
  jax.tree.map(np.testing.assert_array_equal, greedy, beam)
  for item in range(20):
    check(greedy, reference_search(table[item], [2], 1, 7, 1), item)


@pytest.mark.parametrize(
  ("kind", "rows", "options"),
  [
    ("beam", 3, {"mode": "standard"}),
    ("beam", 3, {"mode": "reference"}),
    ("sample", 3, {"top_k": 4, "top_p": 0.9}),
  ],
)
def test_items_do_not_depend_on_batch_or_padding(kind, rows, options):
  prompts = [[2], [2, 3, 4], [4, 4, 2], [3], [2]]
  table = make_table(8, len(prompts), 7, eos_bonus=0.5)
  padded = [p + [6] * (3 - len(p)) for p in prompts]  # junk beyond the prompt must not count
  keys = make_keys(1, len(prompts))
  options = dict(max_length=5, min_length=3, no_repeat_ngram=2, **options)
  together = run(kind, table, padded, rows, list(map(len, prompts)), keys=keys, **options)
  assert len({s for item in together.lengths.tolist() for s in item}) > 2
  for item, prompt in enumerate(prompts):
    one = slice(item, item + 1)
    alone = run(kind, table[one], [prompt], rows, keys=keys[one], **options)
    assert sequences(alone) == sequences(together, item)
    np.testing.assert_array_equal(alone.lengths[0], together.lengths[item])
    np.testing.assert_allclose(alone.scores[0], together.scores[item], rtol=1e-6)
    start = len(prompt)
    for tokens in sequences(alone):
      assert tokens[:start] == prompt
      assert start + 4 <= len(tokens) <= start + 5
      assert EOS not in tokens[start : start + 3]


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
    jax.block_until_ready(_jit(search)(make_cache(table, 2)))
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
