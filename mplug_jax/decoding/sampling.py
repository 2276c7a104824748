"""Sampling with temperature, top-k and top-p.

Forbidden tokens are removed first. Then the logits are divided by temperature, top_k keeps the k
most probable tokens (ties: the lowest ids), and top_p keeps the fewest of them, best first, whose
probability (rescaled to sum to 1) reaches top_p (Holtzman et al. 2020).

Sample k of an item draws its token s with fold_in(fold_in(key, k), s), so it depends neither on the
other items nor on the number of samples. Keys are threefry keys, the default of JAX, whose draws do
not depend on the batch.

The score of a sample is the sum of the log-probabilities of its generated tokens, eos included,
under the model's distribution: temperature 1, nothing filtered or forbidden, no length penalty.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int, Key

from mplug_jax.arrays import Array
from mplug_jax.decoding.constraints import forbid_tokens
from mplug_jax.decoding.tokens import (
  Generation,
  StepFn,
  append_tokens,
  check_options,
  column,
  log_softmax,
  token_buffer,
)


class _Sampler(NamedTuple):
  """Constants of one call of `sample`."""

  step_fn: StepFn
  prompt_length: jax.Array  # i32[B]
  sample_keys: jax.Array  # key[B, K]
  max_length: int
  eos_id: int
  temperature: float
  top_k: int
  top_p: float
  constraints: dict[str, Any]  # options of forbid_tokens


class _SampleState(NamedTuple):
  position: jax.Array  # i32[]
  cache: object
  samples: Generation
  done: jax.Array  # bool[B, K]


def sample(
  step_fn: StepFn,
  cache: Any,
  prompt: Int[Array, "batch width"],
  prompt_length: Int[Array, " batch"],
  keys: Key[Array, " batch"],
  *,
  num_samples: int,
  max_length: int,
  min_length: int = 0,
  eos_id: int,
  pad_id: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  no_repeat_ngram: int = 0,
  allowed: Bool[Array, "..."] | None = None,
) -> Generation:
  """Returns independent samples per item, in the order drawn (not sorted by score).

  Args:
    step_fn: see beam_search.py, as all options that are not listed here.
    cache: state of `step_fn`.
    prompt: right-padded.
    prompt_length: number of tokens of each prompt, at least 1.
    keys: one random key per item, see the module.
    num_samples: samples per item.
    max_length: maximum number of generated tokens, the final eos included.
    min_length: minimum number of generated tokens before eos.
    eos_id: id of eos.
    pad_id: id of padding.
    temperature: divides the logits.
    top_k: number of tokens kept; 0: all.
    top_p: probability kept; 1: all.
    no_repeat_ngram: n > 0 forbids repeated n-grams.
    allowed: the only tokens that may be generated; None: all.

  Returns:
    Generation. Scores are sums of the log-probabilities of the generated tokens, see the module.

  Raises:
    ValueError: an option is out of range.
  """
  check_options(prompt, prompt_length, max_length, min_length, no_repeat_ngram)
  _check_sampling(num_samples, temperature, top_k, top_p)
  tokens = token_buffer(prompt, prompt_length, num_samples, max_length, pad_id)
  per_sample = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
  sample_keys = per_sample(keys, jnp.arange(num_samples))
  constraints = dict(min_length=min_length, no_repeat_ngram=no_repeat_ngram, allowed=allowed)
  sampler = _Sampler(
    step_fn, prompt_length, sample_keys, max_length, eos_id, temperature, top_k, top_p, constraints
  )
  return _run(sampler, _initial_state(tokens, prompt_length, cache))


def _check_sampling(num_samples: int, temperature: float, top_k: int, top_p: float) -> None:
  """Raises ValueError if an option of sampling is out of range."""
  if num_samples < 1 or temperature <= 0 or top_k < 0 or not 0 < top_p <= 1:
    raise ValueError(
      "sampling needs num_samples >= 1, temperature > 0, top_k >= 0 and 0 < top_p <= 1, got "
      f"{num_samples=}, {temperature=}, {top_k=}, {top_p=}"
    )


def _initial_state(tokens, prompt_length, cache):
  """The state at position 0, from the token buffer i32[B, K, T]."""
  shape = tokens.shape[:2]
  lengths = jnp.broadcast_to(prompt_length[:, None], shape)
  samples = Generation(tokens, lengths, jnp.zeros(shape, jnp.float32))
  return _SampleState(jnp.int32(0), cache, samples, jnp.zeros(shape, bool))


def _run(sampler, state):
  """Walks over the positions and returns the samples."""
  last = state.samples.tokens.shape[-1] - 1
  state = jax.lax.while_loop(
    lambda s: (s.position < last) & ~jnp.all(s.done), functools.partial(_step, sampler), state
  )
  return state.samples


def _step(sampler, state):
  """The state one position later."""
  tokens, lengths, scores = state.samples
  generated = state.position + 1 - sampler.prompt_length
  active = (generated >= 0)[:, None] & ~state.done
  logits, cache = sampler.step_fn(state.cache, column(tokens, state.position), state.position)
  log_prob = log_softmax(logits)
  permitted = forbid_tokens(
    log_prob,
    tokens,
    state.position,
    generated,
    eos_id=sampler.eos_id,
    early_eos=-jnp.inf,
    **sampler.constraints,
  )
  dead = jnp.all(permitted == -jnp.inf, axis=-1)
  step = jnp.broadcast_to(jnp.maximum(generated, 0)[:, None], state.done.shape)
  keys = jax.vmap(jax.vmap(jax.random.fold_in))(sampler.sample_keys, step)
  token = _draw(keys, permitted / sampler.temperature, sampler.top_k, sampler.top_p)
  token = jnp.where(dead, sampler.eos_id, token)
  log_prob = jnp.take_along_axis(log_prob, token[:, :, None], axis=-1)[:, :, 0]
  ended = (token == sampler.eos_id) | (generated + 1 == sampler.max_length)[:, None]
  token = jnp.where(active, token, column(tokens, state.position + 1))
  samples = Generation(
    append_tokens(tokens, state.position + 1, token),
    jnp.where(active, lengths + 1, lengths),
    jnp.where(active, scores + log_prob, scores),
  )
  return _SampleState(state.position + 1, cache, samples, state.done | (active & ended))


def _draw(keys, logits, top_k, top_p):
  """One token i32[B, K] from logits f32[B, K, V], filtered, with keys key[B, K]."""
  categorical = jax.vmap(jax.vmap(jax.random.categorical))
  if not top_k and top_p == 1:
    return categorical(keys, logits).astype(jnp.int32)
  vocabulary = logits.shape[-1]
  logits, ids = jax.lax.top_k(logits, min(top_k or vocabulary, vocabulary))
  if top_p < 1:
    probability = jax.nn.softmax(logits, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # Rank 0 is always kept, even if rounding makes its `before` larger than top_p.
    keep = (before < top_p) | (jnp.arange(logits.shape[-1]) == 0)
    logits = jnp.where(keep, logits, -jnp.inf)
  rank = categorical(keys, logits)
  return jnp.take_along_axis(ids, rank[:, :, None], axis=-1)[:, :, 0]
