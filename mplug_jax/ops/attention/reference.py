"""Attention by two matrix products and a softmax, with its gradient rule."""

import math

import jax.numpy as jnp

from mplug_jax.ops.attention.common import Form, masked_scores
from mplug_jax.ops.dropout import dropout


def plain_forward(rate, query, key, value, mask, rng, first_row=0):
  scores = masked_scores(query, key, mask)
  largest = scores.max(-1, keepdims=True)
  weights = jnp.exp(scores - largest)
  total = weights.sum(-1, keepdims=True)
  weights = dropout(weights, rate, rng, first_row).astype(value.dtype)
  # Dividing after the product with the values touches L x Dh numbers instead of L x S.
  out = jnp.einsum("bhls,bhsd->bhld", weights, value, preferred_element_type=jnp.float32) / total
  return out.astype(value.dtype), largest, 1.0 / total


def plain_backward(
  rate, query, key, value, mask, rng, out, largest, inverse, cotangent, first_row=0
):
  """With P the probabilities and dP their gradient, dS = P (dP - sum P dP), and the sum is the cotangent times the output."""
  dtype, scale = value.dtype, 1.0 / math.sqrt(query.shape[-1])
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
