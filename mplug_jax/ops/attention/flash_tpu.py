"""JAX's Pallas flash attention for TPU.

Its public function does not separate the two directions. They are called separately here, so that
every platform keeps the same arrays between them. Both are private functions of JAX: they are
imported when a program for TPU is traced, and tests/ops/test_attention.py pins their signatures.
"""

import math
from typing import Any

import jax.numpy as jnp

from mplug_jax.ops.attention.common import Form, per_shard

LANES = 128  # of a TPU: lengths are padded to a multiple

LARGEST_BLOCK = 640  # queries or keys of a step of the flash kernel: 577 image tokens fit one


def _kernel() -> Any:
  """Returns JAX's module of the flash kernel."""
  from jax.experimental.pallas.ops.tpu import flash_attention

  return flash_attention


def _pad(x, value=0.0):
  """f[B, H, L, ...] -> f[B, H, L padded to a multiple of LANES, ...]."""
  return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES), (0, 0)), constant_values=value)


def _flash_inputs(query, key, value, mask):
  """Pads the inputs and chooses the blocks.

  Returns:
    (padded query, key, value, segment ids or None, block sizes, bool[B, 1, 1, 1] true for rows
    with any key, or None).
  """
  flash = _kernel()
  rows, _, length, _ = query.shape
  keys = key.shape[2]
  if mask is None:
    some, seen = None, jnp.ones((rows, keys), bool)
  else:
    # A row without any key: equal scores give the mean of all values, as the reference does.
    mask = jnp.broadcast_to(mask[:, 0, 0], (rows, keys))
    some, seen = mask.any(-1)[:, None, None, None], mask | ~mask.any(-1, keepdims=True)
    query = jnp.where(some, query, 0)
  query, key, value = _pad(query), _pad(key), _pad(value)
  segments = None
  if mask is not None or keys % LANES:
    seen = jnp.pad(seen.astype(jnp.int32), ((0, 0), (0, -keys % LANES)))
    segments = flash.SegmentIds(jnp.ones((rows, query.shape[2]), jnp.int32), seen)
  of_queries, of_keys = (
    max(n for n in range(LANES, LARGEST_BLOCK + 1, LANES) if x.shape[2] % n == 0)
    for x in (query, key)
  )
  blocks = flash.BlockSizes(
    block_q=of_queries,
    block_k_major=of_keys,
    block_k=of_keys,
    block_b=1,
    block_q_major_dkv=of_queries,
    block_q_dkv=of_queries,
    block_k_major_dkv=of_keys,
    block_k_dkv=of_keys,
    block_q_dq=of_queries,
    block_k_major_dq=of_keys,
    block_k_dq=of_keys,
  )
  return query, key, value, segments, blocks, some


def _flash_forward(rate, query, key, value, mask, rng):
  del rate, rng
  length, scale = query.shape[2], 1.0 / math.sqrt(query.shape[-1])

  def shard(query, key, value, mask):
    query, key, value, segments, blocks, _ = _flash_inputs(query, key, value, mask)
    out, saved = _kernel()._flash_attention_fwd(
      query, key, value, None, segments, False, False, scale, blocks, False
    )
    total, largest = (x[:, :, :length, None] for x in saved[-2:])
    return out[:, :, :length], largest, 1.0 / total

  return per_shard(shard, query, key, value, mask)


def _flash_backward(rate, query, key, value, mask, rng, out, largest, inverse, cotangent):
  del rate, rng
  length, keys, scale = query.shape[2], key.shape[2], 1.0 / math.sqrt(query.shape[-1])

  def shard(query, key, value, mask, out, largest, inverse, cotangent):
    query, key, value, segments, blocks, some = _flash_inputs(query, key, value, mask)
    saved = (
      query,
      key,
      value,
      None,
      segments,
      _pad(out),
      1.0 / _pad(inverse, 1.0)[..., 0],
      _pad(largest)[..., 0],
    )
    d_query, d_key, d_value, *_ = _kernel()._flash_attention_bwd(
      False, False, scale, blocks, False, saved, _pad(cotangent)
    )
    d_query = d_query[:, :, :length]
    return (
      d_query if some is None else jnp.where(some, d_query, 0),
      d_key[:, :, :keys],
      d_value[:, :, :keys],
    )

  return per_shard(shard, query, key, value, mask, out, largest, inverse, cotangent)


FLASH = Form(_flash_forward, _flash_backward)
