"""Random keys derived by a 32-bit hash: the dropout sites and parameters of a model.

JAX's own keys cost a hundred instructions for each key that is derived. A model derives one for
every dropout and parameter, which makes up a fifth of the compilation of a small model's train step
and half of its initialization's.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import random as extend_random
from jaxtyping import PRNGKeyArray, UInt32

from mplug_jax.arrays import Array

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: spreads consecutive integers


def mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
  """Returns a one-to-one hash of every element: MurmurHash3's 32-bit finalizer."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


@jax.jit  # traced once
def _fold_in(key: Any, data: Any) -> Any:
  """One-to-one in `key` for each `data`, and in `data` for each `key`; both words depend on all."""
  first = mix(key[0] ^ (jnp.uint32(data) * jnp.uint32(_GOLDEN)))
  second = mix(key[1] + first)
  return jnp.stack([first ^ second, second])


def _seed(seed: Any) -> Any:
  high = seed >> 32 if seed.dtype.itemsize > 4 else jnp.zeros_like(seed)
  return _fold_in(jnp.stack([seed, high]).astype(jnp.uint32), 0)


def _split(key: Any, shape: tuple[int, ...]) -> Any:
  children = jnp.arange(1, math.prod(shape) + 1, dtype=jnp.uint32)
  return jax.vmap(_fold_in, (None, 0))(key, children).reshape(*shape, 2)


def _random_bits(key: Any, bit_width: int, shape: tuple[int, ...]) -> Any:
  if bit_width > 32:
    raise TypeError(f"Hashed keys draw at most 32 bits at once, not {bit_width}.")
  index = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
  words = mix(mix(index ^ key[0]) + key[1])
  return (words >> (32 - bit_width)).astype(f"uint{bit_width}")


# The `impl` of jax.random.key.
HASH = extend_random.define_prng_impl(
  key_shape=(2,),
  seed=_seed,
  split=_split,
  random_bits=_random_bits,
  fold_in=_fold_in,
  name="mplug_hash",
  tag="mplug",
)


def model_key(key: PRNGKeyArray, prng_impl: str) -> PRNGKeyArray:
  """Returns the key that a model derives those of its dropout sites and parameters from.

  Args:
    key: key of an update or of the initialization, of any kind that JAX knows.
    prng_impl: "hash" for keys of this module, "jax" for `key` itself; see config.check.
  """
  if prng_impl == "jax":
    return key
  return jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl=HASH)


def seeds(key: PRNGKeyArray) -> UInt32[Array, "2"]:
  """Returns two random words of a key, which must not be used again."""
  if jax.random.key_impl(key) == HASH:
    return jax.random.key_data(key)
  return jax.random.bits(key, (2,), jnp.uint32)
