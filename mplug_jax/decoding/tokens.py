"""Array helpers shared by beam search and sampling."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from mplug_jax.arrays import Array

# Stands in for log 0 where the result must stay finite (docs/official.md item 30).
LOG_ZERO = -1e20

# (cache, tokens i32[B, K], position i32[]) -> (logits f32[B, K, V], cache), see beam_search.py.
StepFn = Callable[[Any, Int[Array, "batch rows"], Int[Array, ""]], tuple[Float[Array, "..."], Any]]


class Generation(NamedTuple):
  """Generated sequences: K per item.

  A beam search that finds fewer than K sequences fills up with the bare prompt and score -inf.

  Attributes:
    tokens: prompt included, padded with the pad id.
    lengths: number of tokens that are not padding.
    scores: natural logarithms.
  """

  tokens: Int[Array, "batch rows length"]
  lengths: Int[Array, "batch rows"]
  scores: Float[Array, "batch rows"]


def log_softmax(logits: Float[Array, "*rows vocabulary"]) -> Float[Array, "*rows vocabulary"]:
  """Returns float32 log-probabilities; a row of -inf stays -inf instead of NaN."""
  logits = logits.astype(jnp.float32)
  empty = jnp.all(logits == -jnp.inf, axis=-1, keepdims=True)
  return jnp.where(empty, -jnp.inf, jax.nn.log_softmax(logits, axis=-1))


def token_buffer(
  prompt: Int[Array, "batch width"],
  prompt_length: Int[Array, " batch"],
  rows: int,
  max_length: int,
  pad_id: int,
) -> Int[Array, "batch {rows} width+{max_length}"]:
  """Returns each item's prompt, `rows` times, then padding."""
  inside = jnp.arange(prompt.shape[1]) < prompt_length[:, None]
  tokens = jnp.where(inside, prompt, pad_id).astype(jnp.int32)
  tokens = jnp.pad(tokens, ((0, 0), (0, max_length)), constant_values=pad_id)
  return jnp.tile(tokens[:, None, :], (1, rows, 1))


def column(
  tokens: Int[Array, "batch rows length"], position: Int[Array, ""]
) -> Int[Array, "batch rows"]:
  """Returns the tokens at a position."""
  return jax.lax.dynamic_index_in_dim(tokens, position, axis=2, keepdims=False)


def append_tokens(
  tokens: Int[Array, "batch rows length"],
  position: Int[Array, ""],
  token: Int[Array, "batch rows"],
) -> Int[Array, "batch rows length"]:
  """Returns the tokens with `token` written at a position."""
  return jax.lax.dynamic_update_index_in_dim(tokens, token, position, axis=2)


def take_beams(
  tokens: Int[Array, "batch rows length"], index: Int[Array, "batch chosen"]
) -> Int[Array, "batch chosen length"]:
  """Returns the rows with these indices."""
  return jnp.take_along_axis(tokens, index[:, :, None], axis=1)


def check_options(
  prompt: jax.Array,
  prompt_length: jax.Array,
  max_length: int,
  min_length: int,
  no_repeat_ngram: int,
) -> None:
  """Checks shapes and options of a search.

  Raises:
    ValueError: a shape does not fit, or an option is out of range.
  """
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
