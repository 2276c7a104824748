"""Parts shared by all forms of attention: options, masking, and the call per shard of the mesh."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Float32, Int32, PRNGKeyArray, UInt32

from mplug_jax.arrays import Array
from mplug_jax.ops import prng
from mplug_jax.parallel.mesh import BATCH_AXES

# Score of a masked key: finite, so a row without any key gives a mean, not NaN.
MASKED = -1e9

# How the arrays of attention are split over the mesh, by the letters of their shapes.
CHANNELS = P(BATCH_AXES, None, "tensor")  # [B, L, H * Dh]
HEADS = P(BATCH_AXES, "tensor")  # [B, H, ...]
ROWS = P(BATCH_AXES)  # [B, ...]


class Options(NamedTuple):
  """Static options of a call.

  Attributes:
    heads: number of heads H.
    rate: dropout rate of the probabilities.
    causal: whether query i attends to keys 0 to i only.
  """

  heads: int
  rate: float
  causal: bool


class Form(NamedTuple):
  """One way to compute attention; both directions of a call use the same.

  Attributes:
    forward: (options, query, key, value, mask, rng) -> (out, largest score f32[B, H, L, 1], 1 / sum
      of exponentials f32[B, H, L, 1]).
    backward: (options, query, key, value, mask, rng, out, largest, inverse, cotangent) -> gradients
      of query, key and value.
  """

  forward: Callable[..., Any]
  backward: Callable[..., Any]


def per_shard(function: Callable[..., Any], in_specs: Any, out_specs: Any, *args: Any) -> Any:
  """Returns function(*args), computed on every device for its rows and heads.

  Args:
    function: takes and returns the part of a device.
    in_specs: PartitionSpec of each argument; a dimension of size 1 is not split.
    out_specs: PartitionSpec of each result.
    *args: arrays, or None.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.manual_axes:
    return function(*args)

  def spec(axes, x):
    return None if x is None else P(*(a if n > 1 else None for a, n in zip(axes, x.shape)))

  specs = tuple(map(spec, in_specs, args))
  return jax.shard_map(function, in_specs=specs, out_specs=out_specs, check_vma=False)(*args)


def forward_per_shard(
  shard: Callable[..., Any], heads: int, query: Any, key: Any, value: Any, mask: Any, rng: Any
) -> Any:
  """Returns what Form.forward returns, computed on every device for its rows and heads.

  Args:
    shard: (mask, rng, head numbers, query, key, value) -> (out, largest, inverse) of a device.
    heads: number of heads.
    query: and the other arguments: those of Form.forward.
    key: keys.
    value: values.
    mask: mask of keys, or None.
    rng: random key of the dropout, or None.
  """
  return per_shard(
    shard,
    (ROWS, (), HEADS, CHANNELS, CHANNELS, CHANNELS),
    (CHANNELS, HEADS, HEADS),
    *(mask, rng, head_numbers(query.shape[0], heads), query, key, value),
  )


def backward_per_shard(
  shard: Callable[..., Any],
  heads: int,
  query: Any,
  key: Any,
  value: Any,
  mask: Any,
  rng: Any,
  out: Any,
  largest: Any,
  inverse: Any,
  cotangent: Any,
) -> Any:
  """Returns what Form.backward returns, computed on every device for its rows and heads.

  Args:
    shard: (mask, rng, head numbers, query, key, value, out, cotangent, largest, inverse) ->
      gradients of query, key and value of a device.
    heads: number of heads.
    query: and the other arguments: those of Form.backward.
    key: keys.
    value: values.
    mask: mask of keys, or None.
    rng: random key of the dropout, or None.
    out: result of the forward direction, as the next two.
    largest: largest scores.
    inverse: 1 / sums of exponentials.
    cotangent: gradient of `out`.
  """
  return per_shard(
    shard,
    (ROWS, (), HEADS, *[CHANNELS] * 5, HEADS, HEADS),
    (CHANNELS, CHANNELS, CHANNELS),
    *(mask, rng, head_numbers(query.shape[0], heads)),
    *(query, key, value, out, cotangent, largest, inverse),
  )


def head_numbers(rows: int, heads: int) -> UInt32[Array, "rows heads"]:
  """Returns the number of each row's heads in the whole array, for dropout on a part of it."""
  return jnp.arange(rows * heads, dtype=jnp.uint32).reshape(rows, heads)


def kernel_scalars(
  rng: PRNGKeyArray | None, numbers: UInt32[Array, "rows heads"]
) -> Int32[Array, "4"]:
  """Returns what a kernel needs for dropout: both seeds, and the number of its first head twice.

  Args:
    rng: random key of the dropout; None: seeds of 0, which no kernel reads.
    numbers: see `head_numbers`.
  """
  seeds = jnp.zeros((2,), jnp.uint32) if rng is None else prng.seeds(rng)
  first = numbers[0, :1]
  return jax.lax.bitcast_convert_type(jnp.concatenate([seeds, first, first]), jnp.int32)


def split_heads(
  x: Float[Array, "batch length channels"], heads: int
) -> Float[Array, "batch {heads} length width"]:
  """Returns the channels of `x` as heads."""
  return x.reshape((*x.shape[:2], heads, -1)).transpose(0, 2, 1, 3)


def merge_heads(
  x: Float[Array, "batch heads length width"],
) -> Float[Array, "batch length channels"]:
  """Returns the heads of `x` as channels."""
  return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def may_attend(
  length: Any, keys: Any, mask: Bool[Array, "rows keys"] | None, causal: bool
) -> Bool[Array, "rows 1 queries keys"] | None:
  """Returns which keys a query attends to, or None for all; `queries` is 1 if all agree.

  Args:
    length: number of queries, an int or a symbol of an export.
    keys: number of keys, likewise.
    mask: keys that may be attended to, or None for all.
    causal: whether query i attends to keys 0 to i only.
  """
  allowed = None if mask is None else jnp.asarray(mask)[:, None, None, :]
  if causal:
    earlier = jnp.tril(jnp.ones((length, keys), bool))[None, None]
    allowed = earlier if allowed is None else earlier & allowed
  return allowed


def masked_scores(
  query: Float[Array, "batch heads length width"],
  key: Float[Array, "batch heads keys width"],
  allowed: Bool[Array, "..."] | None,
) -> Float32[Array, "batch heads length keys"]:
  """Returns the scores of `attention` before the softmax; `allowed` is that of `may_attend`."""
  scores = jnp.einsum(
    "bhld,bhsd->bhls",
    query * (1.0 / math.sqrt(query.shape[-1])),
    key,
    preferred_element_type=jnp.float32,
  )
  return scores if allowed is None else jnp.where(allowed, scores, MASKED)
