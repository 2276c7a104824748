"""Attention a head at a time, which is faster on CPU for long sequences."""

import jax
import jax.numpy as jnp

from mplug_jax.ops.attention.common import (
  Form,
  Options,
  backward_per_shard,
  forward_per_shard,
  may_attend,
  merge_heads,
)
from mplug_jax.ops.attention.reference import heads_backward, heads_forward


def _over_heads(function, options: Options, mask, rng, numbers, channels, heads):
  """Runs a direction of the reference for one head after another.

  Args:
    function: `heads_forward` or `heads_backward`.
    options: see Options.
    mask: see `attention`.
    rng: random key of the dropout, or None.
    numbers: see `head_numbers`.
    channels: arrays [B, L, H * Dh]: query, key, value and those of the direction.
    heads: arrays [B, H, ...] of the direction, before the last of `channels` if there are any.
  """
  rows, count = numbers.shape
  length, keys = (x.shape[1] for x in channels[:2])
  width = channels[0].shape[2] // count

  def one(index):
    row, head = index // count, index % count
    query, key, value, *others = (
      jax.lax.dynamic_slice(x, (row, 0, head * width), (1, x.shape[1], width))[:, None]
      for x in channels
    )
    numbers_of_head = [x[row, head][None, None] for x in heads]
    row_mask = None if mask is None else mask[row if mask.shape[0] > 1 else 0][None]
    allowed = may_attend(length, keys, row_mask, options.causal)
    saved = (*others[:1], *numbers_of_head, *others[1:])
    first_row = numbers[row, head] * jnp.uint32(length)
    return function(options.rate, query, key, value, allowed, rng, *saved, first_row=first_row)

  results = jax.lax.map(one, jnp.arange(rows * count))
  return tuple(x.reshape(rows, count, *x.shape[3:]) for x in results)


def _forward(options: Options, *args):
  def shard(mask, rng, numbers, *channels):
    out, *saved = _over_heads(heads_forward, options, mask, rng, numbers, channels, ())
    return merge_heads(out), *saved

  return forward_per_shard(shard, options.heads, *args)


def _backward(options: Options, *args):
  def shard(mask, rng, numbers, query, key, value, out, cotangent, *heads):
    channels = (query, key, value, out, cotangent)
    results = _over_heads(heads_backward, options, mask, rng, numbers, channels, heads)
    return tuple(map(merge_heads, results))

  return backward_per_shard(shard, options.heads, *args)


BLOCKED = Form(_forward, _backward)
