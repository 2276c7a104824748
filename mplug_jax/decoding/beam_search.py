"""Greedy search and beam search over a step function, for any model.

Letters in shapes: B items, K beams or samples per item, P prompt width, V vocabulary,
T = P + max_length.

Every function takes
  step_fn(cache, tokens i32[B, K], position i32[]) -> (logits f32[B, K, V], cache): reads the tokens
    at `position` and predicts those at `position + 1`;
  reorder_fn(cache, parents i32[B, K]) -> cache (beam search only): row k of the result is row
    parents[:, k];
  prompt i32[B, P], right-padded, and prompt_length i32[B] with 1 <= prompt_length <= P.
One `lax.while_loop` walks over the positions. The token of an item is forced inside its prompt and
generated after it. All counts (min_length, max_length, length penalty, random keys) start at the
end of the item's prompt, so no result depends on the other items or on the padding. The loop ends
as soon as every item has ended. All options are static: jit a call with them closed over.

Options with one meaning everywhere:
  max_length: maximum number of tokens generated per sequence, the final eos included.
  min_length: eos is forbidden while fewer than this many tokens have been generated.
  no_repeat_ngram: n > 0 forbids a token that completes an n-gram already in the sequence, prompt
    included.
  allowed: bool[V], the only tokens that may be generated (without eos among them, sequences run to
    max_length).
Forbidden tokens lose all their probability; the probability of the others is not scaled up in any
score. When nothing is permitted, the sequence ends with eos.

The score of a sequence is its sum of log-probabilities / ((5 + generated tokens) / 6) **
length_penalty (Wu et al. 2016, equation 14). Modes of beam search:
  "standard": of the best 2K continuations, those that end with eos go to a store of the K best
    hypotheses, and the best K others stay live. An item ends when no live beam can still beat the
    n_best-th stored hypothesis (so a small n_best ends sooner), or at max_length. Unfinished beams
    fill the places that finished hypotheses left empty, after all finished ones.
  "reference": docs/official.md item 30. A beam that ends with eos is stored but stays in the beam
    and is extended past its eos. An item ends when its best beam ends with eos, or at max_length;
    then all its K beams are stored, finished or not.
With one beam both modes are greedy search, which ends at the first eos.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from mplug_jax.arrays import Array
from mplug_jax.decoding.constraints import forbid_tokens
from mplug_jax.decoding.tokens import (
  LOG_ZERO,
  Generation,
  StepFn,
  append_tokens,
  check_options,
  column,
  log_softmax,
  take_beams,
  token_buffer,
)


class _Search(NamedTuple):
  """Constants of one search, see the module."""

  step_fn: StepFn
  reorder_fn: Callable[[Any, Int[Array, "batch rows"]], Any] | None
  prompt_length: jax.Array  # i32[B]
  penalties: jax.Array  # f32[max_length], divisors of the scores of 1, 2, ... generated tokens
  n_best: int
  eos_id: int
  is_reference: bool
  constraints: dict[str, Any]  # options of forbid_tokens


class _BeamState(NamedTuple):
  position: jax.Array  # i32[], the last position known for every live beam
  cache: object
  tokens: jax.Array  # i32[B, K, T], live beams, best first
  log_prob: jax.Array  # f32[B, K], of the generated part of each live beam
  done: jax.Array  # bool[B]
  stored: Generation  # the K best hypotheses so far, best first


def beam_search(
  step_fn: StepFn,
  reorder_fn: Callable[[Any, Int[Array, "batch rows"]], Any] | None,
  cache: Any,
  prompt: Int[Array, "batch width"],
  prompt_length: Int[Array, " batch"],
  *,
  beams: int,
  max_length: int,
  min_length: int = 0,
  eos_id: int,
  pad_id: int,
  length_penalty: float = 0.6,
  mode: str = "standard",
  n_best: int | None = None,
  no_repeat_ngram: int = 0,
  allowed: Bool[Array, "..."] | None = None,
) -> Generation:
  """Returns the sequences with the highest length-normalized log-probability.

  Args:
    step_fn: see the module, as all options that are not listed here.
    reorder_fn: None only with one beam.
    cache: state of `step_fn`.
    prompt: right-padded.
    prompt_length: number of tokens of each prompt, at least 1.
    beams: number of beams K.
    max_length: maximum number of generated tokens.
    min_length: minimum number of generated tokens before eos.
    eos_id: id of eos.
    pad_id: id of padding.
    length_penalty: exponent of the length; 0: none.
    mode: "standard" or "reference".
    n_best: sequences returned per item; None: all beams.
    no_repeat_ngram: length of n-grams that do not repeat; 0: no limit.
    allowed: the only tokens that may be generated; None: all tokens.

  Returns:
    Generation with K = n_best, best first.

  Raises:
    ValueError: an option is out of range.
  """
  n_best = beams if n_best is None else n_best
  check_options(prompt, prompt_length, max_length, min_length, no_repeat_ngram)
  _check_beams(beams, n_best, mode)
  reference = mode == "reference" or beams == 1
  constraints = dict(min_length=min_length, no_repeat_ngram=no_repeat_ngram, allowed=allowed)
  penalties = _length_penalties(max_length, length_penalty)
  search = _Search(
    step_fn, reorder_fn, prompt_length, penalties, n_best, eos_id, reference, constraints
  )
  tokens = token_buffer(prompt, prompt_length, beams, max_length, pad_id)
  return _run(search, _initial_state(tokens, prompt_length, cache))


def greedy(
  step_fn: StepFn,
  cache: Any,
  prompt: Int[Array, "batch width"],
  prompt_length: Int[Array, " batch"],
  *,
  max_length: int,
  min_length: int = 0,
  eos_id: int,
  pad_id: int,
  length_penalty: float = 0.6,
  no_repeat_ngram: int = 0,
  allowed: Bool[Array, "..."] | None = None,
) -> Generation:
  """Returns the most probable token at each position: `beam_search` with one beam.

  Its arguments are those of `beam_search`.

  Returns:
    Generation with K = 1 and the scores of `beam_search`.

  Raises:
    ValueError: an option is out of range.
  """
  return beam_search(
    step_fn,
    None,
    cache,
    prompt,
    prompt_length,
    beams=1,
    max_length=max_length,
    min_length=min_length,
    eos_id=eos_id,
    pad_id=pad_id,
    length_penalty=length_penalty,
    no_repeat_ngram=no_repeat_ngram,
    allowed=allowed,
  )


def _check_beams(beams: int, n_best: int, mode: str) -> None:
  """Raises ValueError if the number of beams or the mode is out of range."""
  if beams < 1 or not 1 <= n_best <= beams:
    raise ValueError(f"beam search needs 1 <= n_best <= beams, got n_best={n_best}, beams={beams}")
  if mode not in ("standard", "reference"):
    raise ValueError(f"unknown beam search mode {mode!r}; use 'standard' or 'reference'")


def _length_penalties(max_length, power):
  """Divisors f32[max_length] of the scores of 1, 2, ... generated tokens."""
  # Rounded once from float64: float32 powers differ between platforms.
  return jnp.asarray(((6 + np.arange(max_length)) / 6) ** power, jnp.float32)


def _initial_state(tokens, prompt_length, cache):
  """The state at position 0, from the token buffer i32[B, K, T]."""
  batch, beams, _ = tokens.shape
  # All beams of an item start equal, so only one may be expanded at first.
  first = jnp.arange(beams)[None, :] == 0
  log_prob = jnp.tile(jnp.where(first, 0.0, -jnp.inf).astype(jnp.float32), (batch, 1))
  lengths = jnp.tile(prompt_length[:, None], (1, beams))
  stored = Generation(tokens, lengths, jnp.full_like(log_prob, -jnp.inf))
  return _BeamState(jnp.int32(0), cache, tokens, log_prob, jnp.zeros(batch, bool), stored)


def _run(search, state):
  """Walks over the positions and returns the n_best hypotheses of every item."""
  last = state.tokens.shape[-1] - 1
  state = jax.lax.while_loop(
    lambda s: (s.position < last) & ~jnp.all(s.done), functools.partial(_step, search), state
  )
  if search.is_reference:
    stored = state.stored
  else:
    stored = _fill_with_unfinished(state, search.prompt_length, search.penalties)
  return Generation(*(x[:, : search.n_best] for x in stored))


def _step(search, state):
  """The state one position later."""
  # i32[B]: index among the generated tokens of the next one; negative inside the prompt.
  generated = state.position + 1 - search.prompt_length
  active = (generated >= 0) & ~state.done
  logits, cache = search.step_fn(state.cache, column(state.tokens, state.position), state.position)
  log_prob = forbid_tokens(
    log_softmax(logits),
    state.tokens,
    state.position,
    generated,
    eos_id=search.eos_id,
    early_eos=LOG_ZERO if search.is_reference else -jnp.inf,
    **search.constraints,
  )
  total = _end_dead_items(state.log_prob[:, :, None] + log_prob, state.log_prob, search.eos_id)
  advance = _advance_reference if search.is_reference else _advance_standard
  parents, token, log_prob, stored, ended = advance(search, state, total, generated, active)
  beams = state.log_prob.shape[1]
  parents = jnp.where(active[:, None], parents, jnp.arange(beams)[None, :])
  if beams > 1:
    cache = search.reorder_fn(cache, parents)
  # The buffer already holds the prompt, and padding for items that have ended.
  token = jnp.where(active[:, None], token, column(state.tokens, state.position + 1))
  tokens = append_tokens(take_beams(state.tokens, parents), state.position + 1, token)
  log_prob = jnp.where(active[:, None], log_prob, state.log_prob)
  done = state.done | (active & ended)
  return _BeamState(state.position + 1, cache, tokens, log_prob, done, stored)


def _advance_reference(search, state, total, generated, active):
  """One official step: (parents, token, log_prob [B, K], stored Generation, ended bool[B])."""
  beams = state.log_prob.shape[1]
  penalties = search.penalties
  penalty = penalties[jnp.clip(generated, 0, len(penalties) - 1)][:, None]
  # Divided before the ranking and multiplied back, as the original: same rounding, same ties.
  scores, parents, token = _best(total / penalty[:, :, None], beams)
  finished = token == search.eos_id
  ended = finished[:, 0] | (generated + 1 == len(penalties))
  store = (finished | ended[:, None]) & active[:, None]
  stored = _store(state, parents, token, jnp.where(store, scores, -jnp.inf))
  return parents, token, scores * penalty, stored, ended


def _advance_standard(search, state, total, generated, active):
  """One standard step: (parents, token, log_prob [B, K], stored Generation, ended bool[B])."""
  beams = state.log_prob.shape[1]
  penalties = search.penalties
  last = len(penalties) - 1
  # Each beam has one eos, so 2K candidates hold at least K others.
  log_prob, parents, token = _best(total, 2 * beams)
  finished = token == search.eos_id
  penalty = penalties[jnp.clip(generated, 0, last)][:, None]
  store = finished & active[:, None]
  stored = _store(state, parents, token, jnp.where(store, log_prob / penalty, -jnp.inf))

  log_prob, kept = jax.lax.top_k(jnp.where(finished, -jnp.inf, log_prob), beams)
  parents, token = (jnp.take_along_axis(x, kept, axis=1) for x in (parents, token))
  # Log-probabilities only fall, so this bounds every score the best live beam can still reach.
  largest = jnp.maximum(penalties[jnp.clip(generated + 1, 0, last)], penalties[last])
  hopeless = log_prob[:, 0] / largest <= stored.scores[:, search.n_best - 1]
  return parents, token, log_prob, stored, hopeless | (generated == last)


def _fill_with_unfinished(state, prompt_length, penalties):
  """Puts live beams, best first, behind the stored hypotheses where fewer than K are stored."""
  beams = state.log_prob.shape[1]
  finished = jnp.sum(state.stored.scores > -jnp.inf, axis=1, keepdims=True)
  rank = jnp.maximum(jnp.arange(beams)[None, :] - finished, 0)
  scores = jnp.take_along_axis(state.log_prob, rank, axis=1) / penalties[-1]
  lengths = jnp.broadcast_to(prompt_length[:, None] + len(penalties), rank.shape)
  fill = (jnp.arange(beams)[None, :] >= finished) & (scores > -jnp.inf)
  return Generation(
    jnp.where(fill[:, :, None], take_beams(state.tokens, rank), state.stored.tokens),
    jnp.where(fill, lengths, state.stored.lengths),
    jnp.where(fill, scores, state.stored.scores),
  )


def _store(state, parents, token, scores):
  """The K best of the store and the candidates [B, C]; ties stay in order of arrival."""
  tokens = append_tokens(take_beams(state.tokens, parents), state.position + 1, token)
  lengths = jnp.full(scores.shape, state.position + 2, jnp.int32)
  pool = jax.tree.map(
    lambda *x: jnp.concatenate(x, axis=1), state.stored, Generation(tokens, lengths, scores)
  )
  scores, index = jax.lax.top_k(pool.scores, state.stored.scores.shape[1])
  lengths = jnp.take_along_axis(pool.lengths, index, axis=1)
  return Generation(take_beams(pool.tokens, index), lengths, scores)


def _best(values, count):
  """The `count` largest of values f32[B, K, V], best first: (value, beam, token) [B, count]."""
  batch, beams, vocabulary = values.shape
  # Those of each beam first: K x V values in one row are a copy on TPU. Ties stay in their order.
  each = min(count, vocabulary)
  values, token = jax.lax.top_k(values.reshape(batch * beams, vocabulary), each)
  values, index = jax.lax.top_k(values.reshape(batch, -1), min(count, beams * each))
  return values, index // each, jnp.take_along_axis(token.reshape(batch, -1), index, axis=1)


def _end_dead_items(total, log_prob, eos_id):
  """Gives eos to the live beams (log_prob > -inf) of items with no permitted token at all."""
  dead = jnp.all(total == -jnp.inf, axis=(1, 2))[:, None]
  return total.at[:, :, eos_id].set(jnp.where(dead, log_prob + LOG_ZERO, total[:, :, eos_id]))
