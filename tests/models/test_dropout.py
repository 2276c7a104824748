"""Dropout masks and random initial values: their statistics, and that nothing repeats them."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.models import layers
from mplug_jax.ops import dropout, initializers


def masks(keys, shape, rate):
  return np.asarray(jax.jit(jax.vmap(lambda k: dropout.keep_mask(k, shape, rate)))(keys))


def correlations(rows):
  """Correlations f64[N * (N - 1)] of all pairs of rows of bool[N, M], for M samples."""
  x = rows.astype(np.float64) - rows.mean()
  c = x @ x.T / (rows.shape[1] * rows.var())
  return c[~np.eye(len(c), dtype=bool)]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_keep_mask_has_the_right_frequency_everywhere(rate):
  mask = masks(jax.random.split(jax.random.key(0), 8), (64, 512), rate)
  for axis in [(0, 1, 2), (0, 1), (0, 2), (1, 2)]:
    count = np.prod([mask.shape[a] for a in axis])
    z = (mask.mean(axis) - (1 - rate)) / np.sqrt(rate * (1 - rate) / count)
    assert np.abs(z).max() < 5, (axis, np.abs(z).max())
    if z.size > 50:  # neither more nor less even than chance
      assert 0.7 < z.std() < 1.3, (axis, z.std())


def test_keep_mask_is_independent_across_rows_columns_and_keys():
  keys = jax.random.split(jax.random.key(1), 64)
  mask = masks(keys, (64, 1024), 0.5)
  for rows in (
    mask[0],
    mask[0, :, :256].reshape(16, -1),
    mask[:, 3],
    mask[:4].reshape(-1, 1024)[:, ::16].T,
  ):
    c = correlations(rows)
    assert np.abs(c).max() < 5.5 / np.sqrt(rows.shape[1]), rows.shape
  assert not np.array_equal(mask[0], mask[1])
  close = masks(
    jax.vmap(jax.random.key)(jnp.arange(64)), (16, 64), 0.5
  )  # keys whose seeds differ by one
  assert np.abs(correlations(close.reshape(64, -1))).max() < 5.5 / np.sqrt(1024)


def test_keep_mask_of_more_axes_has_distinct_rows():
  mask = masks(jax.random.split(jax.random.key(2), 1), (3, 4, 5, 64), 0.5)[0].reshape(60, 64)
  assert len({row.tobytes() for row in mask}) == 60


def test_normal_initializer_is_normal_and_differs_between_keys_and_rows():
  draw = jax.vmap(lambda key: initializers.normal(0.02)(key, (64, 4096)))
  x = np.asarray(draw(jax.random.split(jax.random.key(4), 8))) / 0.02
  count = x.size
  assert np.isfinite(x).all()
  assert 4.5 < np.abs(x).max() < 6
  for power, moment, variance in [
    (1, 0, 1),
    (2, 1, 2),
    (3, 0, 15),
    (4, 3, 96),
  ]:  # of the standard normal
    assert abs((x**power).mean() - moment) < 5 * math.sqrt(variance / count), power
  for rows in (x[0], x[:, 0], x[:, :, :4096:8].transpose(2, 0, 1).reshape(512, -1)[:64]):
    c = np.corrcoef(rows)
    assert np.abs(c[~np.eye(len(c), dtype=bool)]).max() < 5.5 / math.sqrt(rows.shape[1])


def test_keep_mask_does_not_depend_on_the_sharding():
  shape, keys = (8, 16, 24), [jax.random.key(seed) for seed in range(3, 7)]
  mesh = jax.make_mesh((2, 4), ("a", "b"))
  specs = [(("a", "b"),), ("a", "b"), (None, "a", "b"), (None, None, ("a", "b"))]
  shardings = [jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*s)) for s in specs]

  # A key for each, lest the compiler draw one mask for all.
  def draw():
    return [dropout.keep_mask(key, shape, 0.3) for key in keys]

  plain, split = jax.jit(draw)(), jax.jit(draw, out_shardings=shardings)()
  for spec, sharded, expected in zip(specs, split, plain, strict=True):
    assert len({str(s.index) for s in sharded.addressable_shards}) == 8, spec
    np.testing.assert_array_equal(sharded, expected, err_msg=str(spec))


def test_dropout_zeroes_or_scales_and_keeps_the_expectation():
  x = np.linspace(1.0, 2.0, 200_000, dtype=np.float32).reshape(400, 500)
  out = np.asarray(jax.jit(dropout.dropout, static_argnums=1)(x, 0.2, jax.random.key(0)))
  kept = out != 0
  np.testing.assert_allclose(out[kept], x[kept] / 0.8, rtol=1e-6)
  assert abs(out.mean() - 1.5) < 5 * 1.5 * np.sqrt(0.2 / 0.8 / x.size)
  assert dropout.dropout(x, 0.2, None) is x
  assert dropout.dropout(x, 0.0, jax.random.key(0)) is x


class Probe(nn.Module):
  """A layer that shows its two dropout masks."""

  def setup(self):
    self.first = layers.Dropout(rate=0.5)
    self.second = layers.Dropout(rate=0.5)

  @nn.compact
  def __call__(self, x):
    nn.Dense(4, name="dense")(x)
    return x, (self.first(x), self.second(x))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_scanned_layers_differ_at_initialisation_and_in_dropout(remat):
  stack = layers.scan(Probe, 3, remat)()
  x = np.ones((2, 128), np.float32)

  @jax.jit
  def run(key):
    params = stack.init(key, x)
    _, seen = stack.apply(params, x, rngs={"dropout": key})
    return params["params"]["dense"]["kernel"], seen, stack.apply(params, x)[1]

  kernels, seen, still = jax.device_get(run(jax.random.key(0)))
  assert kernels.shape == (3, 128, 4)
  assert len({k.tobytes() for k in kernels}) == 3
  seen = np.concatenate(seen).reshape(6, -1)
  assert set(np.unique(seen)) == {0.0, 2.0}
  assert np.abs(correlations(seen > 0)).max() < 5 / np.sqrt(256)
  assert all(np.array_equal(s, np.ones((3, 2, 128))) for s in still)
