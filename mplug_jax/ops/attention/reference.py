"""Attention by two matrix products and a softmax, with a gradient rule.

`attention_reference` is the same with JAX's gradient rule and random bits.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, PRNGKeyArray

from mplug_jax.arrays import Array
from mplug_jax.ops.attention.common import (
  Form,
  Options,
  masked_scores,
  may_attend,
  merge_heads,
  split_heads,
)
from mplug_jax.ops.dropout import dropout, dropout_reference


def attention_reference(
  query: Float[Array, "batch length channels"],
  key: Float[Array, "batch keys channels"],
  value: Float[Array, "batch keys channels"],
  heads: int,
  mask: Bool[Array, "rows keys"] | None = None,
  causal: bool = False,
  rate: float = 0.0,
  rng: PRNGKeyArray | None = None,
) -> Float[Array, "batch length channels"]:
  """Returns what `attention` returns, with JAX's gradient rule and random bits."""
  allowed = may_attend(query.shape[1], key.shape[1], mask, causal)
  scores = masked_scores(split_heads(query, heads), split_heads(key, heads), allowed)
  weights = dropout_reference(jax.nn.softmax(scores), rate, rng)
  out = jnp.einsum(
    "bhls,bhsd->bhld",
    weights.astype(value.dtype),
    split_heads(value, heads),
    preferred_element_type=jnp.float32,
  )
  return merge_heads(out.astype(value.dtype))


def heads_forward(
  rate: float,
  query: Float[Array, "batch heads length width"],
  key: Float[Array, "batch heads keys width"],
  value: Float[Array, "batch heads keys width"],
  allowed: Bool[Array, "..."] | None,
  rng: PRNGKeyArray | None,
  first_row: int | Array = 0,
) -> tuple[
  Float[Array, "batch heads length width"],
  Float32[Array, "batch heads length 1"],
  Float32[Array, "batch heads length 1"],
]:
  """Returns (attention, largest score, 1 / sum of exponentials) of split heads.

  Args:
    rate: dropout rate of the probabilities.
    query: queries.
    key: keys.
    value: values.
    allowed: see `may_attend`.
    rng: random key of the dropout, or None.
    first_row: index of the first row of probabilities in the array of all blocks, for dropout.
  """
  scores = masked_scores(query, key, allowed)
  largest = scores.max(-1, keepdims=True)
  weights = jnp.exp(scores - largest)
  total = weights.sum(-1, keepdims=True)
  weights = dropout(weights, rate, rng, first_row).astype(value.dtype)
  # Dividing after the product with the values touches L x Dh numbers instead of L x S.
  out = jnp.einsum("bhls,bhsd->bhld", weights, value, preferred_element_type=jnp.float32) / total
  return out.astype(value.dtype), largest, 1.0 / total


def heads_backward(
  rate: float,
  query: Float[Array, "batch heads length width"],
  key: Float[Array, "batch heads keys width"],
  value: Float[Array, "batch heads keys width"],
  allowed: Bool[Array, "..."] | None,
  rng: PRNGKeyArray | None,
  out: Float[Array, "batch heads length width"],
  largest: Float32[Array, "batch heads length 1"],
  inverse: Float32[Array, "batch heads length 1"],
  cotangent: Float[Array, "batch heads length width"],
  first_row: int | Array = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the gradients of split query, key and value; arguments as of `heads_forward`.

  With P the probabilities and dP their gradient, dS = P (dP - sum P dP), and the sum is the
  cotangent times the output.
  """
  dtype = value.dtype
  scale = 1.0 / math.sqrt(query.shape[-1])
  weights = jnp.exp(masked_scores(query, key, allowed) - largest) * inverse
  d_value = jnp.einsum(
    "bhls,bhld->bhsd", dropout(weights, rate, rng, first_row).astype(dtype), cotangent
  )
  d_weights = jnp.einsum("bhld,bhsd->bhls", cotangent, value, preferred_element_type=jnp.float32)
  inner = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
  d_scores = weights * (dropout(d_weights, rate, rng, first_row) - inner)
  if allowed is not None:
    # Of a row without any key; elsewhere it is 0 already.
    d_scores = jnp.where(allowed, d_scores, 0.0)
  d_scores = d_scores.astype(dtype)
  d_query = jnp.einsum("bhls,bhsd->bhld", d_scores, key * scale).astype(query.dtype)
  return d_query, jnp.einsum("bhls,bhld->bhsd", d_scores, query * scale), d_value


def _forward(options: Options, query, key, value, mask, rng):
  query, key, value = (split_heads(x, options.heads) for x in (query, key, value))
  allowed = may_attend(query.shape[2], key.shape[2], mask, options.causal)
  out, largest, inverse = heads_forward(options.rate, query, key, value, allowed, rng)
  return merge_heads(out), largest, inverse


def _backward(options: Options, query, key, value, mask, rng, out, largest, inverse, cotangent):
  query, key, value, out, cotangent = (
    split_heads(x, options.heads) for x in (query, key, value, out, cotangent)
  )
  allowed = may_attend(query.shape[2], key.shape[2], mask, options.causal)
  gradients = heads_backward(
    options.rate, query, key, value, allowed, rng, out, largest, inverse, cotangent
  )
  return tuple(map(merge_heads, gradients))


PLAIN = Form(_forward, _backward)
