"""Dropout, from random bits that do not depend on how an array is sharded or in which blocks it is computed."""

import functools

import jax
import jax.numpy as jnp


def _mix(x):
  """Finaliser of a 32-bit hash: two rounds of multiply and xor-shift. u32[...] -> u32[...]."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


@functools.partial(jax.jit, static_argnums=1)  # traced once for each shape
def random_bits(key, shape, first_row=0):
  """u32[shape], uniform. Shape () is not one of them. A block of a larger array whose rows start at `first_row` gets that one's bits.

  A counter-based hash of (key, element index) rather than `jax.random.bits`: a quarter of the arithmetic, it fuses into
  its consumer instead of being stored, and an element's value does not depend on how the array is sharded.
  """
  seeds = jax.random.bits(key, (2,), jnp.uint32)
  row, stride = jnp.full(shape[:-1] + (1,), first_row, jnp.uint32), 1
  for axis in reversed(range(len(shape) - 1)):
    row += jax.lax.broadcasted_iota(jnp.uint32, shape[:-1] + (1,), axis) * jnp.uint32(
      stride & 0xFFFFFFFF
    )
    stride *= shape[axis]
  column = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
  return _mix(_mix(row ^ seeds[0]) + column * jnp.uint32(0x9E3779B9) + seeds[1])


def keep_mask(key, shape, rate, first_row=0):
  """bool[shape], True with probability 1 - rate; first_row: see random_bits."""
  return random_bits(key, shape, first_row) >= jnp.uint32(int(rate * 2**32))


def dropout(x, rate, key, first_row=0):
  """Zeroes elements with probability `rate`, scales the rest by 1 / (1 - rate). key None or rate 0: identity."""
  if key is None or rate == 0.0:
    return x
  return jnp.where(
    keep_mask(key, x.shape, rate, first_row), x * (1.0 / (1.0 - rate)), jnp.zeros((), x.dtype)
  )
