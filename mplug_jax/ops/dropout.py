"""Dropout, from random bits that do not depend on sharding or on the blocks of a computation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, PRNGKeyArray, UInt32

from mplug_jax.arrays import Array
from mplug_jax.ops import prng


@functools.partial(jax.jit, static_argnums=1)  # traced once for each shape
def random_bits(
  key: PRNGKeyArray, shape: tuple[int, ...], first_row: int | Array = 0
) -> UInt32[Array, "..."]:
  """Returns uniform random bits.

  A counter-based hash of (key, element index) rather than `jax.random.bits`: it has a quarter of
  the arithmetic, fuses into its consumer instead of being stored, and an element's value does not
  depend on how the array is sharded.

  Args:
    key: random key.
    shape: at least one dimension.
    first_row: index of the first row; a block of a larger array gets the bits of that array.
  """
  seeds = prng.seeds(key)
  row = jnp.full(shape[:-1] + (1,), first_row, jnp.uint32)
  stride = 1
  for axis in reversed(range(len(shape) - 1)):
    row += jax.lax.broadcasted_iota(jnp.uint32, shape[:-1] + (1,), axis) * jnp.uint32(
      stride & 0xFFFFFFFF
    )
    stride *= shape[axis]
  column = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
  return bits_at(seeds[0], seeds[1], row, column)


def bits_at(first: Any, second: Any, row: Any, column: Any) -> Any:
  """Returns the bits of `random_bits` at some elements.

  Args:
    first: u32, the first seed, see prng.seeds.
    second: u32, the second one.
    row: u32, index of the row among all rows.
    column: u32, index in the row.
  """
  return prng.mix(prng.mix(row ^ first) + column * jnp.uint32(0x9E3779B9) + second)


def keep_mask(
  key: PRNGKeyArray, shape: tuple[int, ...], rate: float, first_row: int | Array = 0
) -> Bool[Array, "..."]:
  """Returns a mask that is True with probability 1 - rate; arguments as of `random_bits`."""
  return random_bits(key, shape, first_row) >= jnp.uint32(int(rate * 2**32))


def dropout(
  x: Float[Array, "*shape"], rate: float, key: PRNGKeyArray | None, first_row: int | Array = 0
) -> Float[Array, "*shape"]:
  """Returns `x` with elements zeroed with probability `rate`, the others scaled by 1 / (1 - rate).

  Args:
    x: any array.
    rate: 0: `x` itself.
    key: random key; None: `x` itself.
    first_row: see `random_bits`.
  """
  if key is None or rate == 0.0:
    return x
  return jnp.where(
    keep_mask(key, x.shape, rate, first_row), x * (1.0 / (1.0 - rate)), jnp.zeros((), x.dtype)
  )


def dropout_reference(
  x: Float[Array, "*shape"], rate: float, key: PRNGKeyArray | None
) -> Float[Array, "*shape"]:
  """Returns what `dropout` returns, with JAX's random bits."""
  if key is None or rate == 0.0:
    return x
  return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)
