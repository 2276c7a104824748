"""Constraints on the next token: minimum length, repeated n-grams, repetition penalty."""

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from mplug_jax.arrays import Array
from mplug_jax.decoding.tokens import column


def forbid_tokens(
  log_prob: Float[Array, "batch rows vocabulary"],
  tokens: Int[Array, "batch rows length"],
  position: Int[Array, ""],
  generated: Int[Array, " batch"],
  *,
  min_length: int,
  eos_id: int,
  no_repeat_ngram: int,
  allowed: Bool[Array, "..."] | None,
  early_eos: float,
) -> Float[Array, "batch rows vocabulary"]:
  """Returns log-probabilities of the next token with -inf for forbidden ones.

  Args:
    log_prob: natural logarithms.
    tokens: sequences up to `position`.
    position: last known position.
    generated: index of the next token among the generated ones.
    min_length: eos is forbidden while fewer tokens have been generated.
    eos_id: id of eos.
    no_repeat_ngram: n > 0 forbids tokens that complete a repeated n-gram.
    allowed: bool[vocabulary], the only tokens that may be generated; None: all.
    early_eos: largest log-probability of eos before `min_length`.

  Raises:
    ValueError: `allowed` does not have the size of the vocabulary.
  """
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
    last = column(tokens, position - n + 2 + offset)
    match &= tokens[:, :, offset : offset + width - n + 1] == last[:, :, None]
  banned = jnp.zeros((batch, beams, vocabulary), bool)
  items = jnp.arange(batch)[:, None, None]
  rows = jnp.arange(beams)[None, :, None]
  return banned.at[items, rows, tokens[:, :, n - 1 :]].max(match)
