"""Tables of log probabilities and a reference search for the tests of decoding."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.decoding import beam_search, sampling
from mplug_jax.decoding import tokens as tokens_lib

VOCABULARY, EOS, PAD, ROWS = 5, 1, 0, 97


def mix(state, token, position):
  """Hash of a prefix: the toy model's whole memory, so a wrong reorder or position changes it."""
  return (state * 31 + token * 17 + position * 7 + 3) % ROWS


def step_fn(cache, tokens, position):
  state = mix(cache["state"], tokens, position)
  logits = jnp.take_along_axis(cache["table"], state[:, :, None], axis=1)
  return logits, {**cache, "state": state}


def reorder_fn(cache, parents):
  return {**cache, "state": jnp.take_along_axis(cache["state"], parents, axis=1)}


def make_cache(table, rows):
  return {"table": table, "state": np.zeros((len(table), rows), np.int32)}


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
    state = mix(state, token, position)
  row = table[state].astype(np.float64)
  with np.errstate(divide="ignore"):
    return row - np.log(np.exp(row).sum())


# Many small programs, each run once or twice: compile time is all that counts here.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def jitted(kind, batch, rows, options):
  options = dict(options)
  if "allowed" in options:
    options["allowed"] = np.array(options["allowed"])
  if kind == "beam":
    fn = functools.partial(beam_search.beam_search, step_fn, reorder_fn, beams=rows)
  elif kind == "greedy":
    fn = functools.partial(beam_search.greedy, step_fn)
  else:
    fn = functools.partial(sampling.sample, step_fn, num_samples=rows)
  return jit(functools.partial(fn, eos_id=EOS, pad_id=PAD, **options))


def run(kind, table, prompt, rows=1, lengths=None, keys=None, **options):
  """Decodes with the toy model; tokens, lengths and scores as numpy arrays."""
  prompt = np.array(prompt, np.int32)
  lengths = np.array([prompt.shape[1]] * len(prompt) if lengths is None else lengths, np.int32)
  fn = jitted(kind, len(prompt), rows, tuple(sorted(options.items())))
  extra = () if kind != "sample" else (make_keys(0, len(prompt)) if keys is None else keys,)
  result = fn(make_cache(table, rows), prompt, lengths, *extra)
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
  finished = []
  others = [v for v in tokens if v != EOS]
  for length in range(max(1, min_length + 1), max_length + 1):
    for body in itertools.product(others, repeat=length - 1):
      sequence = list(prompt) + list(body) + [EOS]
      total = sum(
        log_probs(table, sequence[:i])[sequence[i]] for i in range(len(prompt), len(sequence))
      )
      finished.append((total / penalty(length, power), sequence))
  return sorted(finished, key=lambda c: -c[0])


def check(result, expected, item=0):
  assert sequences(result, item) == [tokens for _, tokens in expected]
  np.testing.assert_allclose(result.scores[item], [score for score, _ in expected], rtol=2e-5)
