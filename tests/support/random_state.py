"""Parameters and train states drawn on the host, and states trained on one batch.

`Build.init` compiles a program of its own, which takes longer than the train step of a tiny model.
Tests that need some state, not that of a seed, take it from here.
"""

import jax
import jax.numpy as jnp
import numpy as np

CONSTANTS = {"scale": 1.0, "bias": 0.0, "value": 0.07}  # norms, layers and the temperature


def params(shapes, stddev=0.02, seed=0):
  """Returns parameters as numpy arrays: constants by name, the rest normal.

  Args:
    shapes: pytree of ShapeDtypeStructs.
    stddev: standard deviation of kernels and embeddings.
    seed: seed of the draws.
  """
  draws = np.random.default_rng(seed)

  def leaf(path, x):
    name = path[-1].key
    # Stacked layers of a scan have one dimension more; a kernel named so has at least three.
    if name in CONSTANTS and len(x.shape) < 3:
      return np.full(x.shape, CONSTANTS[name], x.dtype)
    return (stddev * draws.standard_normal(x.shape)).astype(x.dtype)

  return jax.tree.map_with_path(leaf, shapes)


def host_state(built, stddev=0.02, seed=0):
  """Returns a TrainState of numpy arrays, without random key (rng=()).

  Optimizer states are zeros, as every optimizer here starts.

  Args:
    built: training.build.Build.
    stddev: standard deviation of kernels and embeddings.
    seed: seed of the draws.
  """
  drawn = params(built.abstract.params, stddev, seed)
  return built.abstract.replace(
    step=np.int32(0),
    params=drawn,
    opt_state=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), built.abstract.opt_state),
    ema_params=drawn if jax.tree.leaves(built.abstract.ema_params) else (),
    extra=jax.device_get(jax.jit(built.task.init_extra)()),
    rng=(),
  )


def state(built, stddev=0.02, seed=0):
  """Returns the state of `host_state` on the devices of `built`, with a random key."""
  host = host_state(built, stddev, seed).replace(rng=jax.random.key(seed))
  return jax.tree.map(
    lambda x, a: jax.device_put(x, a.sharding, may_alias=False), host, built.abstract
  )


class Init:
  """Stands for `Build.init` in a run whose first parameters may be any.

  Args:
    built: training.build.Build.
    stddev: standard deviation of kernels and embeddings.
    seed: seed of the draws and of the run's random key.
  """

  def __init__(self, built, stddev, seed):
    self._built, self._stddev, self._seed = built, stddev, seed

  def lower(self):
    return self

  def compile(self):
    return self

  def __call__(self):
    return state(self._built, self._stddev, self._seed)


def overfit(built, batch, stddev, limit, step=None):
  """Trains on one batch until the loss is below 0.01, and returns the state.

  Args:
    built: training.build.Build.
    batch: training batch.
    stddev: standard deviation of the first kernels and embeddings.
    limit: updates after which the loss must be that low.
    step: compiled train step; None for that of `built`.
  """
  train_step = built.train_step if step is None else step
  current, healthy, loss = state(built, stddev), jnp.bool_(True), np.inf
  for done in range(limit):
    current, metrics, health = train_step(current, batch, healthy)
    if done % 10 == 9 and (loss := float(metrics["loss"][0])) < 0.01:
      break
  assert loss < 0.01
  assert bool(health["ok"])
  return current
