"""Layer normalization in float32."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

from mplug_jax.arrays import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(
  x: Float[Array, "*rows width"],
  scale: Float[Array, " width"],
  bias: Float[Array, " width"],
  epsilon: float,
) -> Float32[Array, "*rows width"]:
  """Returns (x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis.

  Its gradient rule keeps the input and two numbers a row; JAX's keeps several arrays of the
  input's size.
  """
  return _normalize_forward(x, scale, bias, epsilon)[0]


def _normalize_forward(x, scale, bias, epsilon):
  wide = x.astype(jnp.float32)
  mean = wide.mean(-1, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + epsilon)
  return (wide - mean) * inverse * scale + bias, (x, mean, inverse, scale)


def _normalize_backward(epsilon, saved, cotangent):
  del epsilon
  x, mean, inverse, scale = saved
  normed = (x.astype(jnp.float32) - mean) * inverse
  inner = cotangent * scale
  dx = inverse * (
    inner - inner.mean(-1, keepdims=True) - normed * (inner * normed).mean(-1, keepdims=True)
  )
  rows = tuple(range(x.ndim - 1))
  return dx.astype(x.dtype), (cotangent * normed).sum(rows), cotangent.sum(rows)


def normalize_reference(
  x: Float[Array, "*rows width"],
  scale: Float[Array, " width"],
  bias: Float[Array, " width"],
  epsilon: float,
) -> Float32[Array, "*rows width"]:
  """Returns what `normalize` returns, with JAX's gradient rule."""
  x = x.astype(jnp.float32)
  normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + epsilon)
  return normed * scale + bias


normalize.defvjp(_normalize_forward, _normalize_backward)
