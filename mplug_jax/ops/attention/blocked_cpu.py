"""Attention a block of heads at a time, which is faster on CPU for long sequences."""

import jax
import jax.numpy as jnp

from mplug_jax.ops.attention.common import Form, per_shard
from mplug_jax.ops.attention.reference import plain_backward, plain_forward

# ---- blocks of one head, for CPU


def _blocked(function, rate, mask, rng, *arrays):
  """A plain direction over one head after another. arrays: query, key, value and what else it takes, all [B, H, ...]."""

  def shard(mask, rng, numbers, *arrays):
    rows, heads, length = arrays[0].shape[:3]
    flat = jax.tree.map(lambda x: x.reshape((rows * heads, 1, 1) + x.shape[2:]), arrays)

    def one(inputs):
      place, number, (query, key, value, *saved) = inputs
      own = None
      if mask is not None:
        own = mask[
          place // heads if mask.shape[0] > 1 else 0, place % heads if mask.shape[1] > 1 else 0
        ][None, None]
      return function(
        rate, query, key, value, own, rng, *saved, first_row=number * jnp.uint32(length)
      )

    results = jax.lax.map(one, (jnp.arange(rows * heads), numbers.ravel(), flat))
    return jax.tree.map(lambda x: x.reshape((rows, heads) + x.shape[3:]), results)

  rows, heads = arrays[0].shape[:2]
  return per_shard(
    shard, mask, rng, jnp.arange(rows * heads, dtype=jnp.uint32).reshape(rows, heads), *arrays
  )


def _blocked_forward(rate, query, key, value, mask, rng):
  return _blocked(plain_forward, rate, mask, rng, query, key, value)


def _blocked_backward(rate, query, key, value, mask, rng, *saved):
  return _blocked(plain_backward, rate, mask, rng, query, key, value, *saved)


BLOCKED = Form(_blocked_forward, _blocked_backward)
