"""Attention by two matrix products and a softmax, with a gradient rule.

`attention_reference` is the same with JAX's gradient rule and random bits.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, PRNGKeyArray

from mplug_jax.arrays import Array
from mplug_jax.ops.attention.common import Form, masked_scores
from mplug_jax.ops.dropout import dropout, dropout_reference


def attention_reference(
  query: Float[Array, "batch heads length width"],
  key: Float[Array, "batch heads keys width"],
  value: Float[Array, "batch heads keys value_width"],
  mask: Bool[Array, "..."] | None = None,
  rate: float = 0.0,
  rng: PRNGKeyArray | None = None,
) -> Float[Array, "batch heads length value_width"]:
  """Returns what `attention` returns, with JAX's gradient rule and random bits."""
  weights = dropout_reference(jax.nn.softmax(masked_scores(query, key, mask)), rate, rng)
  out = jnp.einsum(
    "bhls,bhsd->bhld",
    weights.astype(value.dtype),
    value,
    preferred_element_type=jnp.float32,
  )
  return out.astype(value.dtype)


def plain_forward(
  rate: float,
  query: Float[Array, "batch heads length width"],
  key: Float[Array, "batch heads keys width"],
  value: Float[Array, "batch heads keys value_width"],
  mask: Bool[Array, "..."] | None,
  rng: PRNGKeyArray | None,
  first_row: int | Array = 0,
) -> tuple[
  Float[Array, "batch heads length value_width"],
  Float32[Array, "batch heads length 1"],
  Float32[Array, "batch heads length 1"],
]:
  """Returns (attention, largest score, 1 / sum of exponentials), see `Form`.

  Args:
    rate: dropout rate of the probabilities.
    query: queries.
    key: keys.
    value: values.
    mask: see `attention`.
    rng: random key of the dropout, or None.
    first_row: index of the first row of probabilities in the array of all blocks, for dropout.
  """
  scores = masked_scores(query, key, mask)
  largest = scores.max(-1, keepdims=True)
  weights = jnp.exp(scores - largest)
  total = weights.sum(-1, keepdims=True)
  weights = dropout(weights, rate, rng, first_row).astype(value.dtype)
  # Dividing after the product with the values touches L x Dh numbers instead of L x S.
  out = jnp.einsum("bhls,bhsd->bhld", weights, value, preferred_element_type=jnp.float32) / total
  return out.astype(value.dtype), largest, 1.0 / total


def plain_backward(
  rate: float,
  query: Float[Array, "batch heads length width"],
  key: Float[Array, "batch heads keys width"],
  value: Float[Array, "batch heads keys value_width"],
  mask: Bool[Array, "..."] | None,
  rng: PRNGKeyArray | None,
  out: Float[Array, "batch heads length value_width"],
  largest: Float32[Array, "batch heads length 1"],
  inverse: Float32[Array, "batch heads length 1"],
  cotangent: Float[Array, "batch heads length value_width"],
  first_row: int | Array = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the gradients of query, key and value; arguments as of `plain_forward` and its results.

  With P the probabilities and dP their gradient, dS = P (dP - sum P dP), and the sum is the
  cotangent times the output.
  """
  dtype = value.dtype
  scale = 1.0 / math.sqrt(query.shape[-1])
  weights = jnp.exp(masked_scores(query, key, mask) - largest) * inverse
  d_value = jnp.einsum(
    "bhls,bhld->bhsd", dropout(weights, rate, rng, first_row).astype(dtype), cotangent
  )
  d_weights = jnp.einsum("bhld,bhsd->bhls", cotangent, value, preferred_element_type=jnp.float32)
  inner = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
  d_scores = weights * (dropout(d_weights, rate, rng, first_row) - inner)
  if mask is not None:
    d_scores = jnp.where(mask, d_scores, 0.0)  # of a row without any key; elsewhere it is 0 already
  d_scores = d_scores.astype(dtype)
  d_query = jnp.einsum("bhls,bhsd->bhld", d_scores, key * scale).astype(query.dtype)
  return d_query, jnp.einsum("bhls,bhld->bhsd", d_scores, query * scale), d_value


PLAIN = Form(plain_forward, plain_backward)
