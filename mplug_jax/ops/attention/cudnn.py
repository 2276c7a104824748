"""cuDNN's fused attention for GPU, in half precision, without mask and dropout."""

import jax
import jax.numpy as jnp

from mplug_jax.ops.attention.common import FUSED_FROM


def fits(
  query: jax.Array,
  key: jax.Array,
  mask: jax.Array | None,
  rng: jax.Array | None,
) -> bool:
  """Whether cuDNN supports these inputs.

  JAX asks cuDNN for its version while tracing, so the program must be traced on a machine with a
  GPU.
  """
  return (
    jax.default_backend() == "gpu"
    and query.dtype in (jnp.bfloat16, jnp.float16)
    and mask is None
    and rng is None
    and query.shape[-1] % 8 == 0
    and query.shape[-1] <= 128
    and min(query.shape[2], key.shape[2]) >= FUSED_FROM
  )


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
) -> jax.Array:
  """Returns scaled dot-product attention computed by cuDNN.

  Args:
    query: f[B, H, L, Dh].
    key: f[B, H, S, Dh].
    value: f[B, H, S, Dh].
  """
  swapped = (x.swapaxes(1, 2) for x in (query, key, value))
  return jax.nn.dot_product_attention(*swapped, implementation="cudnn").swapaxes(1, 2)
