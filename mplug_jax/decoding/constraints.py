"""Constraints on the next token: minimum length, repeated n-grams, repetition penalty."""

import jax.numpy as jnp

from mplug_jax.decoding.tokens import column


def forbid_tokens(
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
    last = column(tokens, position - n + 2 + offset)
    match &= tokens[:, :, offset : offset + width - n + 1] == last[:, :, None]
  banned = jnp.zeros((batch, beams, vocabulary), bool)
  items, rows = jnp.arange(batch)[:, None, None], jnp.arange(beams)[None, :, None]
  return banned.at[items, rows, tokens[:, :, n - 1 :]].max(match)
