"""Greedy search, sampling and beam search over a step function; nothing here knows about models.

Letters in shapes: B items, K beams or samples per item, P prompt width, V vocabulary,
T = P + max_length.

Every function takes
  step_fn(cache, tokens i32[B, K], position i32[]) -> (logits f32[B, K, V], cache): reads the tokens
    at `position` and predicts those at `position + 1`;
  reorder_fn(cache, parents i32[B, K]) -> cache (beam search only): row k of the result is row
    parents[:, k];
  prompt i32[B, P], right-padded, and prompt_length i32[B] with 1 <= prompt_length <= P.
One `lax.while_loop` walks over the positions. The token of an item is forced inside its prompt and
generated after it, so all counts (min_length, max_length, length penalty, random keys) start at the
item's own prompt end and no result depends on the other items or on the padding. The loop ends as
soon as every item has ended. All options are static: jit a call with them closed over.

Options with one meaning everywhere:
  max_length: most tokens generated per sequence, the final eos included.
  min_length: eos is forbidden while fewer than this many tokens have been generated.
  no_repeat_ngram: n > 0 forbids a token that completes an n-gram already in the sequence, prompt
    included.
  allowed: bool[V], the only tokens that may be generated (without eos among them, sequences run to
    max_length).
Forbidden tokens lose all their probability; that of the others is not scaled up in any score.
When nothing is permitted, the sequence ends with eos.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Stands in for log 0 where the result must stay finite (docs/official.md item 30).
_LOG_ZERO = -1e20


class Generation(NamedTuple):
  """Generated sequences: K per item.

  tokens: i32[B, K, T], prompt included, padded with the pad id. lengths: i32[B, K], tokens that are
  not padding. scores: f32[B, K], natural logarithms. A beam search that finds fewer than K
  sequences fills up with the bare prompt and score -inf.
  """

  tokens: jax.Array
  lengths: jax.Array
  scores: jax.Array


class _BeamState(NamedTuple):
  position: jax.Array  # i32[], the last position known for every live beam
  cache: object
  tokens: jax.Array  # i32[B, K, T], live beams, best first
  log_prob: jax.Array  # f32[B, K], of the generated part of each live beam
  done: jax.Array  # bool[B]
  stored: Generation  # the K best hypotheses so far, best first


class _SampleState(NamedTuple):
  position: jax.Array  # i32[]
  cache: object
  samples: Generation
  done: jax.Array  # bool[B, K]


def beam_search(
  step_fn,
  reorder_fn,
  cache,
  prompt,
  prompt_length,
  *,
  beams,
  max_length,
  min_length=0,
  eos_id,
  pad_id,
  length_penalty=0.6,
  mode="standard",
  n_best=None,
  no_repeat_ngram=0,
  allowed=None,
):
  """The sequences with the highest length-normalised log-probability, by beam search.

  score = sum of log-probabilities / ((5 + generated tokens) / 6) ** length_penalty (Wu et al. 2016,
  equation 14).
  mode "standard": of the best 2K continuations, those that end with eos go to a store of the K best
    hypotheses, the best K others live on. An item ends when no live beam can still beat the
    n_best-th stored hypothesis (so a small n_best ends sooner), or at max_length. Unfinished beams
    fill places that finished hypotheses left empty, after all finished ones.
  mode "reference": docs/official.md item 30. A beam that ends with eos is stored but stays in the
    beam and is extended past its eos. An item ends when its best beam ends with eos, or at
    max_length; then all its K beams are stored, finished or not.
  With one beam both modes are greedy search, which ends at the first eos.

  Args: see the module; n_best: sequences returned per item, all `beams` of them by default.
  Returns: Generation with K = n_best, best first.
  Raises: ValueError for options out of range.
  """
  n_best = beams if n_best is None else n_best
  _check_options(prompt, prompt_length, max_length, min_length, no_repeat_ngram)
  if beams < 1 or not 1 <= n_best <= beams:
    raise ValueError(f"beam search needs 1 <= n_best <= beams, got n_best={n_best}, beams={beams}")
  if mode not in ("standard", "reference"):
    raise ValueError(f"unknown beam search mode {mode!r}; use 'standard' or 'reference'")
  reference = mode == "reference" or beams == 1
  advance = _advance_reference if reference else functools.partial(_advance_standard, n_best=n_best)
  # Rounded once from float64: float32 powers differ between platforms.
  penalties = jnp.asarray(((6 + np.arange(max_length)) / 6) ** length_penalty, jnp.float32)
  tokens = _buffer(prompt, prompt_length, beams, max_length, pad_id)
  batch, _, width = tokens.shape
  rows = jnp.arange(beams)[None, :]

  def body(state):
    # i32[B]: index among the generated tokens of the one to find; negative inside the prompt.
    generated = state.position + 1 - prompt_length
    active = (generated >= 0) & ~state.done
    logits, cache = step_fn(state.cache, _column(state.tokens, state.position), state.position)
    log_prob = _forbid(
      _log_softmax(logits),
      state.tokens,
      state.position,
      generated,
      min_length=min_length,
      eos_id=eos_id,
      no_repeat_ngram=no_repeat_ngram,
      allowed=allowed,
      early_eos=_LOG_ZERO if reference else -jnp.inf,
    )
    total = _end_dead_items(state.log_prob[:, :, None] + log_prob, state.log_prob, eos_id)
    parents, token, log_prob, stored, ended = advance(
      state, total, generated, active, penalties=penalties, eos_id=eos_id
    )
    parents = jnp.where(active[:, None], parents, rows)
    if beams > 1:
      cache = reorder_fn(cache, parents)
    # The buffer already holds the prompt, and padding for items that have ended.
    token = jnp.where(active[:, None], token, _column(state.tokens, state.position + 1))
    tokens = _append(_take(state.tokens, parents), state.position + 1, token)
    log_prob = jnp.where(active[:, None], log_prob, state.log_prob)
    done = state.done | (active & ended)
    return _BeamState(state.position + 1, cache, tokens, log_prob, done, stored)

  # All beams of an item start equal, so only one may be expanded at first.
  log_prob = jnp.tile(jnp.where(rows == 0, 0.0, -jnp.inf).astype(jnp.float32), (batch, 1))
  lengths = jnp.tile(prompt_length[:, None], (1, beams))
  stored = Generation(tokens, lengths, jnp.full_like(log_prob, -jnp.inf))
  state = _BeamState(jnp.int32(0), cache, tokens, log_prob, jnp.zeros(batch, bool), stored)
  state = jax.lax.while_loop(lambda s: (s.position < width - 1) & ~jnp.all(s.done), body, state)
  stored = state.stored if reference else _fill_with_unfinished(state, prompt_length, penalties)
  return Generation(*(x[:, :n_best] for x in stored))


def greedy(
  step_fn,
  cache,
  prompt,
  prompt_length,
  *,
  max_length,
  min_length=0,
  eos_id,
  pad_id,
  length_penalty=0.6,
  no_repeat_ngram=0,
  allowed=None,
):
  """The most probable token at each position: `beam_search` with one beam, without reorder_fn.

  Returns: Generation with K = 1 and the scores of `beam_search`.
  Raises: ValueError for options out of range.
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


def sample(
  step_fn,
  cache,
  prompt,
  prompt_length,
  keys,
  *,
  num_samples,
  max_length,
  min_length=0,
  eos_id,
  pad_id,
  temperature=1.0,
  top_k=0,
  top_p=1.0,
  no_repeat_ngram=0,
  allowed=None,
):
  """K = num_samples independent samples per item, in the order drawn (not sorted by score).

  Forbidden tokens go first, then the logits are divided by temperature, then top_k keeps the k most
  probable tokens (0: all; ties: the lowest ids), then top_p keeps the fewest of them, best first,
  whose probability (rescaled to sum to 1) reaches top_p (Holtzman et al. 2020).

  Args: see the module; keys: key[B], one random key per item (threefry, the default of JAX, whose
    draws do not depend on the batch): sample k draws its token number s with
    fold_in(fold_in(key, k), s), so it depends neither on the other items nor on num_samples.
  Returns: Generation. scores: sum of the log-probabilities of the generated tokens, eos included,
    under the model's own distribution (temperature 1, nothing filtered or forbidden), without
    length penalty.
  Raises: ValueError for options out of range.
  """
  _check_options(prompt, prompt_length, max_length, min_length, no_repeat_ngram)
  if num_samples < 1 or temperature <= 0 or top_k < 0 or not 0 < top_p <= 1:
    raise ValueError(
      "sampling needs num_samples >= 1, temperature > 0, top_k >= 0 and 0 < top_p <= 1, got "
      f"{num_samples=}, {temperature=}, {top_k=}, {top_p=}"
    )
  tokens = _buffer(prompt, prompt_length, num_samples, max_length, pad_id)
  batch, _, width = tokens.shape
  fold_in = jax.vmap(jax.vmap(jax.random.fold_in))
  per_sample = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
  sample_keys = per_sample(keys, jnp.arange(num_samples))

  def body(state):
    tokens, lengths, scores = state.samples
    generated = state.position + 1 - prompt_length
    active = (generated >= 0)[:, None] & ~state.done
    logits, cache = step_fn(state.cache, _column(tokens, state.position), state.position)
    log_prob = _log_softmax(logits)
    permitted = _forbid(
      log_prob,
      tokens,
      state.position,
      generated,
      min_length=min_length,
      eos_id=eos_id,
      no_repeat_ngram=no_repeat_ngram,
      allowed=allowed,
      early_eos=-jnp.inf,
    )
    dead = jnp.all(permitted == -jnp.inf, axis=-1)
    step = jnp.broadcast_to(jnp.maximum(generated, 0)[:, None], state.done.shape)
    token = _draw(fold_in(sample_keys, step), permitted / temperature, top_k, top_p)
    token = jnp.where(dead, eos_id, token)
    log_prob = jnp.take_along_axis(log_prob, token[:, :, None], axis=-1)[:, :, 0]
    ended = (token == eos_id) | (generated + 1 == max_length)[:, None]
    token = jnp.where(active, token, _column(tokens, state.position + 1))
    samples = Generation(
      _append(tokens, state.position + 1, token),
      jnp.where(active, lengths + 1, lengths),
      jnp.where(active, scores + log_prob, scores),
    )
    return _SampleState(state.position + 1, cache, samples, state.done | (active & ended))

  shape = (batch, num_samples)
  lengths = jnp.broadcast_to(prompt_length[:, None], shape)
  samples = Generation(tokens, lengths, jnp.zeros(shape, jnp.float32))
  state = _SampleState(jnp.int32(0), cache, samples, jnp.zeros(shape, bool))
  state = jax.lax.while_loop(lambda s: (s.position < width - 1) & ~jnp.all(s.done), body, state)
  return state.samples


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
    # Rank 0 stays whatever the rounding of its `before`.
    keep = (before < top_p) | (jnp.arange(logits.shape[-1]) == 0)
    logits = jnp.where(keep, logits, -jnp.inf)
  rank = categorical(keys, logits)
  return jnp.take_along_axis(ids, rank[:, :, None], axis=-1)[:, :, 0]


def _advance_reference(state, total, generated, active, *, penalties, eos_id):
  """One official step: (parents, token, log_prob [B, K], stored Generation, ended bool[B])."""
  beams = state.log_prob.shape[1]
  penalty = penalties[jnp.clip(generated, 0, len(penalties) - 1)][:, None]
  # Divided before the ranking and multiplied back, as the original: same rounding, same ties.
  scores, parents, token = _best(total / penalty[:, :, None], beams)
  finished = token == eos_id
  ended = finished[:, 0] | (generated + 1 == len(penalties))
  store = (finished | ended[:, None]) & active[:, None]
  stored = _store(state, parents, token, jnp.where(store, scores, -jnp.inf))
  return parents, token, scores * penalty, stored, ended


def _advance_standard(state, total, generated, active, *, penalties, eos_id, n_best):
  """One standard step: (parents, token, log_prob [B, K], stored Generation, ended bool[B])."""
  beams = state.log_prob.shape[1]
  last = len(penalties) - 1
  # Each beam has one eos, so 2K candidates hold at least K others.
  log_prob, parents, token = _best(total, 2 * beams)
  finished = token == eos_id
  penalty = penalties[jnp.clip(generated, 0, last)][:, None]
  store = finished & active[:, None]
  stored = _store(state, parents, token, jnp.where(store, log_prob / penalty, -jnp.inf))

  log_prob, kept = jax.lax.top_k(jnp.where(finished, -jnp.inf, log_prob), beams)
  parents, token = (jnp.take_along_axis(x, kept, axis=1) for x in (parents, token))
  # Log-probabilities only fall, so this bounds every score the best live beam can still reach.
  largest = jnp.maximum(penalties[jnp.clip(generated + 1, 0, last)], penalties[last])
  hopeless = log_prob[:, 0] / largest <= stored.scores[:, n_best - 1]
  return parents, token, log_prob, stored, hopeless | (generated == last)


def _fill_with_unfinished(state, prompt_length, penalties):
  """Puts live beams, best first, behind the stored hypotheses where fewer than K are stored."""
  beams = state.log_prob.shape[1]
  found = jnp.sum(state.stored.scores > -jnp.inf, axis=1, keepdims=True)
  rank = jnp.maximum(jnp.arange(beams)[None, :] - found, 0)
  scores = jnp.take_along_axis(state.log_prob, rank, axis=1) / penalties[-1]
  lengths = jnp.broadcast_to(prompt_length[:, None] + len(penalties), rank.shape)
  fill = (jnp.arange(beams)[None, :] >= found) & (scores > -jnp.inf)
  return Generation(
    jnp.where(fill[:, :, None], _take(state.tokens, rank), state.stored.tokens),
    jnp.where(fill, lengths, state.stored.lengths),
    jnp.where(fill, scores, state.stored.scores),
  )


def _store(state, parents, token, scores):
  """The K best of the store and the candidates [B, C]; ties stay in order of arrival."""
  tokens = _append(_take(state.tokens, parents), state.position + 1, token)
  lengths = jnp.full(scores.shape, state.position + 2, jnp.int32)
  pool = jax.tree.map(
    lambda *x: jnp.concatenate(x, axis=1), state.stored, Generation(tokens, lengths, scores)
  )
  scores, index = jax.lax.top_k(pool.scores, state.stored.scores.shape[1])
  lengths = jnp.take_along_axis(pool.lengths, index, axis=1)
  return Generation(_take(pool.tokens, index), lengths, scores)


def _best(values, count):
  """The `count` largest of values f32[B, K, V], best first: (value, beam, token) [B, count]."""
  batch, beams, vocabulary = values.shape
  values, index = jax.lax.top_k(values.reshape(batch, -1), min(count, beams * vocabulary))
  return values, index // vocabulary, index % vocabulary


def _end_dead_items(total, log_prob, eos_id):
  """Gives eos to the live beams (log_prob > -inf) of items with no permitted token at all."""
  dead = jnp.all(total == -jnp.inf, axis=(1, 2))[:, None]
  return total.at[:, :, eos_id].set(jnp.where(dead, log_prob + _LOG_ZERO, total[:, :, eos_id]))


def _forbid(
  log_prob, tokens, position, generated, *, min_length, eos_id, no_repeat_ngram, allowed, early_eos
):
  """log_prob f32[B, K, V] with -inf for forbidden tokens, early_eos for eos before min_length."""
  vocabulary = log_prob.shape[-1]
  if allowed is not None:
    if allowed.shape != (vocabulary,):
      raise ValueError(f"`allowed` has shape {allowed.shape}, the logits have {vocabulary} tokens")
    log_prob = jnp.where(allowed, log_prob, -jnp.inf)
  if 0 < no_repeat_ngram <= tokens.shape[-1]:
    repeats = _completes_ngram(tokens, position, no_repeat_ngram, vocabulary)
    log_prob = jnp.where(repeats, -jnp.inf, log_prob)
  if min_length:
    eos = log_prob[:, :, eos_id]
    early = (generated < min_length)[:, None]
    log_prob = log_prob.at[:, :, eos_id].set(jnp.where(early, jnp.minimum(eos, early_eos), eos))
  return log_prob


def _completes_ngram(tokens, position, n, vocabulary):
  """bool[B, K, V]: tokens that at position + 1 repeat an n-gram of tokens[:, :, :position + 1]."""
  batch, beams, width = tokens.shape
  starts = jnp.arange(width - n + 1)
  match = jnp.broadcast_to(starts + n - 1 <= position, (batch, beams, width - n + 1))
  for offset in range(n - 1):
    last = _column(tokens, position - n + 2 + offset)
    match &= tokens[:, :, offset : offset + width - n + 1] == last[:, :, None]
  banned = jnp.zeros((batch, beams, vocabulary), bool)
  items, rows = jnp.arange(batch)[:, None, None], jnp.arange(beams)[None, :, None]
  return banned.at[items, rows, tokens[:, :, n - 1 :]].max(match)


def _log_softmax(logits):
  """float32 log-probabilities; a row of -inf stays -inf instead of NaN."""
  logits = logits.astype(jnp.float32)
  empty = jnp.all(logits == -jnp.inf, axis=-1, keepdims=True)
  return jnp.where(empty, -jnp.inf, jax.nn.log_softmax(logits, axis=-1))


def _buffer(prompt, prompt_length, rows, max_length, pad_id):
  """i32[B, K, T]: each item's prompt, `rows` times, then padding."""
  inside = jnp.arange(prompt.shape[1]) < prompt_length[:, None]
  tokens = jnp.where(inside, prompt, pad_id).astype(jnp.int32)
  tokens = jnp.pad(tokens, ((0, 0), (0, max_length)), constant_values=pad_id)
  return jnp.tile(tokens[:, None, :], (1, rows, 1))


def _column(tokens, position):
  """tokens i32[B, K] at a position."""
  return jax.lax.dynamic_index_in_dim(tokens, position, axis=2, keepdims=False)


def _append(tokens, position, token):
  """tokens with token i32[B, K] written at a position."""
  return jax.lax.dynamic_update_index_in_dim(tokens, token, position, axis=2)


def _take(tokens, index):
  """Rows index i32[B, C] of tokens i32[B, K, T]: i32[B, C, T]."""
  return jnp.take_along_axis(tokens, index[:, :, None], axis=1)


def _check_options(prompt, prompt_length, max_length, min_length, no_repeat_ngram):
  if prompt.ndim != 2 or prompt.shape[1] < 1 or prompt_length.shape != prompt.shape[:1]:
    raise ValueError(
      "decoding needs prompt [B, P] with P >= 1 and prompt_length [B], got shapes "
      f"{prompt.shape} and {prompt_length.shape}"
    )
  if max_length < 1 or not 0 <= min_length <= max_length or no_repeat_ngram < 0:
    raise ValueError(
      "decoding needs max_length >= 1, 0 <= min_length <= max_length and no_repeat_ngram >= 0, "
      f"got {max_length=}, {min_length=}, {no_repeat_ngram=}"
    )
