"""Parts shared by all forms of attention: masking, and the call per shard of the mesh."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Float32

from mplug_jax.arrays import Array
from mplug_jax.parallel.mesh import BATCH_AXES

# Score of a masked key: finite, so a row without any key gives a mean, not NaN.
MASKED = -1e9

FUSED_FROM = 256  # minimum number of queries, and of keys, for which a fused kernel is used


class Form(NamedTuple):
  """One way to compute attention; both directions of a call use the same.

  Attributes:
    forward: (rate, query, key, value, mask, rng) -> (out, largest score f32[B, H, L, 1], 1 / sum of
      exponentials f32[B, H, L, 1]).
    backward: (rate, query, key, value, mask, rng, out, largest, inverse, cotangent) -> gradients of
      query, key and value.
  """

  forward: Callable[..., Any]
  backward: Callable[..., Any]


def per_shard(function: Callable[..., Any], *args: Any) -> Any:
  """Returns function(*args), computed on every device for its rows and heads.

  Args:
    function: result arrays are [B, H, ...].
    *args: arrays [B or 1, H or 1, ...], scalars, or None.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.manual_axes:
    return function(*args)

  def spec(x):
    return P(
      *(axes if size > 1 else None for size, axes in zip(x.shape[:2], (BATCH_AXES, "tensor")))
    )

  return jax.shard_map(
    function, in_specs=jax.tree.map(spec, args), out_specs=P(BATCH_AXES, "tensor"), check_vma=False
  )(*args)


def masked_scores(
  query: Float[Array, "batch heads length width"],
  key: Float[Array, "batch heads keys width"],
  mask: Bool[Array, "..."] | None,
) -> Float32[Array, "batch heads length keys"]:
  """Returns the scores of `attention` before the softmax."""
  scores = jnp.einsum(
    "bhld,bhsd->bhls",
    query * (1.0 / math.sqrt(query.shape[-1])),
    key,
    preferred_element_type=jnp.float32,
  )
  return scores if mask is None else jnp.where(mask, scores, MASKED)
