"""cuDNN's fused attention for GPU, in half precision, without mask and dropout."""

import jax
import jax.numpy as jnp

from mplug_jax.ops.attention.common import Options

_FROM = 256  # minimum number of queries, and of keys, for which cuDNN is used


def fits(
  options: Options,
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
    and not options.causal
    and rng is None
    and query.shape[-1] // options.heads in range(8, 129, 8)
    and min(query.shape[1], key.shape[1]) >= _FROM
  )


def attention(options: Options, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Returns scaled dot-product attention computed by cuDNN.

  Args:
    options: number of heads H.
    query: f[B, L, H * Dh].
    key: f[B, S, H * Dh].
    value: f[B, S, H * Dh].
  """
  heads = (x.reshape(*x.shape[:2], options.heads, -1) for x in (query, key, value))
  return jax.nn.dot_product_attention(*heads, implementation="cudnn").reshape(query.shape)
