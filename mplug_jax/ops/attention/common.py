"""What all forms of attention share: masking, and the call per shard of the mesh."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mplug_jax.parallel.mesh import BATCH_AXES

MASKED = (
  -1e9
)  # added to the score of a masked key: finite, so a row without any key gives a mean, not NaN


FUSED_FROM = 256  # queries, and keys, from which a fused kernel is worth its padding


class Form(NamedTuple):
  """One way to compute attention; both directions of a call use the same.

  forward: (rate, query, key, value, mask, rng) -> (out, largest score f32[B, H, L, 1], 1 / sum of exponentials f32[B, H, L, 1]).
  backward: (rate, query, key, value, mask, rng, out, largest, inverse, cotangent) -> gradients of query, key and value.
  """

  forward: callable
  backward: callable


def per_shard(function, *args):
  """function(*args) on every device's own rows and heads; arrays are [B or 1, H or 1, ...], or scalars."""
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


# ---- the plain path; first_row numbers the first row of probabilities among all, for dropout


def masked_scores(query, key, mask):
  """f32[B, H, L, S] of `attention`, before the softmax."""
  scores = jnp.einsum(
    "bhld,bhsd->bhls",
    query * (1.0 / math.sqrt(query.shape[-1])),
    key,
    preferred_element_type=jnp.float32,
  )
  return scores if mask is None else jnp.where(mask, scores, MASKED)
