"""Config, tokenizer and devices -> everything of a run but its data: what train, evaluate and the tools share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mplug_jax import config as config_lib
from mplug_jax import optim, tasks
from mplug_jax.models.factory import build_model
from mplug_jax.parallel import batches
from mplug_jax.parallel import mesh as mesh_lib
from mplug_jax.training import state
from mplug_jax.training import step as train_step


class Build(NamedTuple):
  """A run without data: everything that follows from the config, the tokenizer and the devices."""

  task: Any
  mesh: Any
  schedules: dict  # {group: step -> learning rate}
  init: Any  # () -> TrainState
  abstract: Any  # TrainState of ShapeDtypeStructs with shardings
  train_step: Any  # jitted (state, batch, healthy) -> (state, metrics, health)
  # {name: (params, batch of this process) -> arrays of all processes' rows}, see `_predictor`
  predict: dict


class Host(NamedTuple):
  """What `Task.prepare` may use between two updates. Every process makes the same calls."""

  predict: dict  # see Build.predict

  def own(self, rows):
    """All processes' rows of an array -> those of this process."""
    count = len(rows) // jax.process_count()
    return rows[jax.process_index() * count :][:count]


def build(config, tokenizer, total_steps=10**9, steps_per_epoch=1, devices=None):
  """Config and tokenizer -> Build.

  Computes nothing, so it also serves compilation for devices that are not there.

  The steps matter to training alone; left out they are more than any warm-up.

  Raises:
    ValueError: a value of the config that nothing can be built from; predict functions are traced,
      so that theirs show here too.
  """
  config_lib.check(config)
  task = tasks.get(config.task.name)(build_model(config, tokenizer), config, tokenizer)
  mesh = mesh_lib.make_mesh(config.mesh, devices)
  parts = config.optim.microbatches
  batches.check_rows(config.batch_size, mesh, "config.batch_size")
  batches.check_rows(
    config.batch_size // parts,
    mesh,
    f"config.batch_size divided by config.optim.microbatches={parts}",
  )
  batches.check_rows(config.eval.batch_size, mesh, "config.eval.batch_size")
  sample = task.batch_spec(1)
  init_params = jax.jit(
    lambda rng: task.init(rng, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sample))
  )  # traced once for all
  params = jax.eval_shape(init_params, jax.random.key(0))
  optimizer, schedules = optim.make(config.optim, params, total_steps, steps_per_epoch)
  init = state.make_init(init_params, optimizer, task.init_extra, config.seed, config.ema.decay > 0)
  abstract = state.abstract_state(init, mesh)
  shardings = state.shardings_of(abstract)
  step = train_step.make_train_step(
    task,
    optimizer,
    microbatches=config.optim.microbatches,
    accumulate=config.optim.accumulate,
    ema_decay=config.ema.decay,
    ema_include=config.ema.include,
  )
  for name, fn in task.predict_fns().items():
    jax.eval_shape(fn, params, task.predict_sample(name, params, sample))
  predict = {name: _predictor(fn, mesh) for name, fn in task.predict_fns().items()}
  return Build(
    task,
    mesh,
    schedules,
    jax.jit(init, out_shardings=shardings),
    abstract,
    jax.jit(step, donate_argnums=0, out_shardings=(shardings, None, None)),
    predict,
  )


def _predictor(fn, mesh):
  """Jits a predict function: this process's numpy rows in, all processes' rows out, with what tells them apart.

  `keep=True` leaves the result on the devices instead; other calls take such results as `kept`,
  {name: result}, beside the batch.
  """
  jitted = jax.jit(
    lambda params, batch: (
      fn(params, batch)
      | {name: batch[name] for name in ("index", "mask", "corrupt") if name in batch}
    )
  )

  def predict(params, batch, kept=None, keep=False):
    with jax.set_mesh(mesh):
      out = jitted(params, batches.put_batch(batch, mesh) | (kept or {}))
    if keep:
      return out
    return jax.tree.map(
      np.asarray,
      out if jax.process_count() == 1 else multihost_utils.process_allgather(out, tiled=True),
    )

  return predict
