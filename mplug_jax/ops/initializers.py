"""Parameter initializers whose values do not depend on the mesh."""

import functools
import math

import jax
import jax.numpy as jnp

from mplug_jax.ops.dropout import random_bits


def normal(stddev):
  """Initializer (key, shape, dtype) -> array: normal, mean 0. Through `random_bits`: five times faster on CPU than JAX's."""

  def init(key, shape, dtype=jnp.float32):
    return (stddev * _standard_normal(key, shape)).astype(dtype)

  return init


@functools.partial(jax.jit, static_argnums=1)
def _standard_normal(key, shape):
  uniform = (random_bits(key, shape) >> 8).astype(jnp.float32) * 2.0**-23 + (
    2.0**-24 - 1.0
  )  # inside (-1, 1), 2^24 values
  return math.sqrt(2.0) * jax.lax.erf_inv(uniform)
