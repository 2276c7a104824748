"""Hashed random keys: no key twice, uniform bits, and independence of what is derived."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.ops import dropout, prng

COUNT = 4096
HASHED = prng.model_key(jax.random.key(0), "hash")


def words(keys):
  return np.asarray(jax.random.key_data(keys)).reshape(-1, 2)


def fold(keys, data):
  return jax.vmap(jax.random.fold_in)(keys, data)


def assert_uniform(bits):
  """Every bit is set as often as not, and no two bits of a word go together."""
  set_bits = (bits.reshape(-1, 1) >> np.arange(32, dtype=np.uint32) & 1).astype(np.float64)
  rows = len(set_bits)
  assert np.abs(set_bits.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(rows)
  together = np.corrcoef(set_bits.T) - np.eye(32)
  assert np.abs(together).max() < 5 / np.sqrt(rows)


def children(kind):
  """COUNT keys that differ in what they are derived from."""
  numbers = np.arange(COUNT, dtype=np.uint32)
  if kind == "sites of one update":  # Flax folds hashes of paths
    return fold(jnp.broadcast_to(HASHED, COUNT), numbers * np.uint32(2654435761))
  if kind == "one site of updates":
    updates = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), numbers)
    return fold(
      jax.vmap(lambda k: prng.model_key(k, "hash"))(updates), np.full(COUNT, 7, np.uint32)
    )
  if kind == "seeds":
    return jax.vmap(lambda seed: jax.random.key(seed, impl=prng.HASH))(numbers)
  if kind == "layers":
    return jax.random.split(HASHED, COUNT)
  return fold(jax.random.split(HASHED, COUNT), np.zeros(COUNT, np.uint32))


@pytest.mark.parametrize(
  "kind", ["sites of one update", "one site of updates", "seeds", "layers", "sites of layers"]
)
def test_derived_keys_are_distinct_uniform_and_unrelated(kind):
  derived = words(children(kind))
  assert len(np.unique(derived, axis=0)) == COUNT
  for column in (0, 1):
    assert_uniform(derived[:, column])
    assert_uniform(derived[1:, column] ^ derived[:-1, column])
  assert_uniform(derived[:, 0] ^ derived[:, 1])


def test_children_differ_from_their_key_and_from_one_another():
  folded = fold(jnp.broadcast_to(HASHED, 3), np.arange(3, dtype=np.uint32))
  split = jax.random.split(HASHED, 3)
  nested = fold(split, np.arange(3, dtype=np.uint32))
  every = np.concatenate([words(k) for k in (HASHED, folded, split[2:], nested)])
  assert len(np.unique(every, axis=0)) == 8


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_split_has_the_shape_that_was_asked_for(shape):
  assert jax.random.split(HASHED, shape).shape == shape


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint16, jnp.uint32])
def test_bits_are_uniform(dtype):
  bits = np.asarray(jax.random.bits(HASHED, (64, 1024), dtype))
  assert bits.dtype == dtype
  top = jnp.iinfo(dtype).max
  assert abs(bits.astype(np.float64).mean() / top - 0.5) < 5 / np.sqrt(12 * bits.size)
  uniform = np.asarray(jax.random.uniform(HASHED, (100_000,)))
  assert 0 <= uniform.min() < 1e-3
  assert 1 - 1e-3 < uniform.max() < 1


def test_masks_of_sibling_sites_are_independent():
  keys = children("sites of one update")[:64]
  masks = np.asarray(jax.vmap(lambda k: dropout.keep_mask(k, (1024,), 0.3))(keys))
  related = np.corrcoef(masks.astype(np.float64)) - np.eye(64)
  assert np.abs(related).max() < 5.5 / np.sqrt(1024)


def test_dropout_reads_a_hashed_key_as_it_is():
  assert (np.asarray(prng.seeds(HASHED)) == words(HASHED)[0]).all()
  key = jax.random.key(3)
  assert (np.asarray(prng.seeds(key)) == np.asarray(jax.random.bits(key, (2,)))).all()


def test_keys_of_other_kinds():
  assert prng.model_key(jax.random.key(1), "jax") == jax.random.key(1)
  kinds = {str(jax.random.key(0, impl=impl).dtype) for impl in ("rbg", "threefry2x32")}
  assert len(kinds) == 2
  for impl in ("rbg", "threefry2x32"):
    assert prng.model_key(jax.random.key(1, impl=impl), "hash").dtype == HASHED.dtype
  with pytest.raises(TypeError, match="at most 32 bits"), jax.enable_x64(True):
    jax.random.bits(HASHED, (2,), jnp.uint64)
