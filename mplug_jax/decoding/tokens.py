"""Array helpers shared by beam search and sampling."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Stands in for log 0 where the result must stay finite (docs/official.md item 30).
LOG_ZERO = -1e20


class Generation(NamedTuple):
  """Generated sequences: K per item.

  tokens: i32[B, K, T], prompt included, padded with the pad id. lengths: i32[B, K], tokens that are
  not padding. scores: f32[B, K], natural logarithms. A beam search that finds fewer than K
  sequences fills up with the bare prompt and score -inf.
  """

  tokens: jax.Array
  lengths: jax.Array
  scores: jax.Array


def log_softmax(logits):
  """float32 log-probabilities; a row of -inf stays -inf instead of NaN."""
  logits = logits.astype(jnp.float32)
  empty = jnp.all(logits == -jnp.inf, axis=-1, keepdims=True)
  return jnp.where(empty, -jnp.inf, jax.nn.log_softmax(logits, axis=-1))


def token_buffer(prompt, prompt_length, rows, max_length, pad_id):
  """i32[B, K, T]: each item's prompt, `rows` times, then padding."""
  inside = jnp.arange(prompt.shape[1]) < prompt_length[:, None]
  tokens = jnp.where(inside, prompt, pad_id).astype(jnp.int32)
  tokens = jnp.pad(tokens, ((0, 0), (0, max_length)), constant_values=pad_id)
  return jnp.tile(tokens[:, None, :], (1, rows, 1))


def column(tokens, position):
  """tokens i32[B, K] at a position."""
  return jax.lax.dynamic_index_in_dim(tokens, position, axis=2, keepdims=False)


def append_tokens(tokens, position, token):
  """tokens with token i32[B, K] written at a position."""
  return jax.lax.dynamic_update_index_in_dim(tokens, token, position, axis=2)


def take_beams(tokens, index):
  """Rows index i32[B, C] of tokens i32[B, K, T]: i32[B, C, T]."""
  return jnp.take_along_axis(tokens, index[:, :, None], axis=1)


def check_options(prompt, prompt_length, max_length, min_length, no_repeat_ngram):
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
