"""Builds a run without its data, as train, evaluate and tools use it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jaxtyping import PRNGKeyArray, Shaped

from mplug_jax import config as config_lib
from mplug_jax import optim, tasks
from mplug_jax.config import Config
from mplug_jax.models.factory import build_model
from mplug_jax.optim.schedules import Schedule
from mplug_jax.parallel import batches
from mplug_jax.parallel import mesh as mesh_lib
from mplug_jax.tasks.base import Batch, Params, PredictFn, Task
from mplug_jax.training import state
from mplug_jax.training import step as train_step
from mplug_jax.training.state import TrainState

# Function (params, batch of this process, kept=None, keep=False) -> {name: array of all processes'
# rows}, see `_predictor`.
Predictor: TypeAlias = Callable[..., dict[str, Any]]


class Build(NamedTuple):
  """A run without data: everything that follows from the config, the tokenizer and the devices.

  Attributes:
    task: task of the run.
    mesh: device mesh.
    schedules: {parameter group: function step -> learning rate}.
    init: jitted function () -> TrainState.
    abstract: TrainState of ShapeDtypeStructs with shardings.
    train_step: jitted function (state, batch, healthy) -> (state, metrics, health).
    predict: {name: function (params, batch of this process) -> arrays of all processes' rows}.
  """

  task: Task
  mesh: jax.sharding.Mesh
  schedules: dict[str, Schedule]
  init: jax.stages.Wrapped
  abstract: TrainState
  train_step: jax.stages.Wrapped
  predict: dict[str, Predictor]


class EvaluationBuild(NamedTuple):
  """The parts of a Build that evaluation needs.

  Attributes:
    task: task of the run.
    mesh: device mesh.
    abstract: TrainState of ShapeDtypeStructs with shardings, without optimizer state.
    predict: see Build.
  """

  task: Task
  mesh: jax.sharding.Mesh
  abstract: TrainState
  predict: dict[str, Predictor]


class Host(NamedTuple):
  """Functions for `Task.prepare` between two updates; every process must make the same calls.

  Attributes:
    predict: see Build.
  """

  predict: Mapping[str, Predictor]

  def local_rows(
    self, rows: Shaped[np.ndarray, "all_rows *shape"]
  ) -> Shaped[np.ndarray, "rows *shape"]:
    """Returns the rows of this process.

    Args:
      rows: rows of all processes, in process order.
    """
    count = len(rows) // jax.process_count()
    return rows[jax.process_index() * count :][:count]


def build(
  config: Config,
  tokenizer: Any,
  total_steps: int = 10**9,
  steps_per_epoch: int = 1,
  devices: Sequence[Any] | None = None,
) -> Build:
  """Builds a run without its data from config, tokenizer and devices.

  Computes nothing, so it also serves compilation for devices that are not attached.

  Args:
    config: config of the run.
    tokenizer: tokenizer of the run, or a StandInTokenizer with as many tokens.
    total_steps: steps of the whole run. Only training needs it; the default exceeds any warm-up.
    steps_per_epoch: steps of an epoch, which only training needs.
    devices: devices of the mesh; None for all.

  Raises:
    ValueError: a value of the config cannot be used. Predict functions are traced, so that their
      errors are raised here too.
  """
  task, mesh, init_params = _build_model(config, tokenizer, devices)
  sample = task.batch_spec(1)
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
  return Build(
    task,
    mesh,
    schedules,
    jax.jit(init, out_shardings=shardings),
    abstract,
    jax.jit(step, donate_argnums=0, out_shardings=(shardings, None, None)),
    _predictors(task, mesh),
  )


def build_for_evaluation(
  config: Config, tokenizer: Any, devices: Sequence[Any] | None = None
) -> EvaluationBuild:
  """Builds what evaluation needs; predict functions are traced when they are called.

  Args:
    config: config of the run.
    tokenizer: tokenizer of the run.
    devices: devices of the mesh; None for all.

  Raises:
    ValueError: a value of the config cannot be used.
  """
  task, mesh, init_params = _build_model(config, tokenizer, devices)
  init = state.make_init(
    init_params, optax.identity(), task.init_extra, config.seed, config.ema.decay > 0
  )
  return EvaluationBuild(task, mesh, state.abstract_state(init, mesh), _predictors(task, mesh))


def _build_model(
  config: Config, tokenizer: Any, devices: Sequence[Any] | None
) -> tuple[Task, jax.sharding.Mesh, Callable[[PRNGKeyArray], Params]]:
  """Returns task, mesh and the jitted function random key -> parameters."""
  config_lib.check(config)
  task = tasks.get(config.task.name)(build_model(config, tokenizer), config, tokenizer)
  mesh = mesh_lib.make_mesh(config.mesh, devices)
  _check_batch_sizes(config, mesh)
  sample = task.batch_spec(1)
  # Jitted, so that it is traced once for all uses.
  init_params = jax.jit(
    lambda rng: task.init(rng, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sample))
  )
  return task, mesh, init_params


def _check_batch_sizes(config: Config, mesh: jax.sharding.Mesh) -> None:
  """Raises ValueError if a batch or microbatch does not divide over the mesh."""
  parts = config.optim.microbatches
  batches.check_rows(config.batch_size, mesh, "config.batch_size")
  batches.check_rows(
    config.batch_size // parts,
    mesh,
    f"config.batch_size divided by config.optim.microbatches={parts}",
  )
  batches.check_rows(config.eval.batch_size, mesh, "config.eval.batch_size")


def _predictors(task: Task, mesh: jax.sharding.Mesh) -> dict[str, Predictor]:
  """Returns the predict functions of a task for the rows of this process."""
  return {name: _predictor(fn, mesh) for name, fn in task.predict_fns().items()}


def _predictor(fn: PredictFn, mesh: jax.sharding.Mesh) -> Predictor:
  """Jits a predict function over the rows of this process.

  The result has all processes' rows as numpy arrays, with "index", "mask" and "corrupt" of the
  batch, which identify the rows. With `keep=True` it stays on the devices instead; other calls
  read such results as `kept`, {name: result}, besides the batch.
  """
  jitted = jax.jit(
    lambda params, batch: (
      fn(params, batch)
      | {name: batch[name] for name in ("index", "mask", "corrupt") if name in batch}
    )
  )

  def predict(
    params: Any, batch: Batch, kept: Mapping[str, Any] | None = None, keep: bool = False
  ) -> dict[str, Any]:
    with jax.set_mesh(mesh):
      out = jitted(params, batches.put_batch(batch, mesh) | dict(kept or {}))
    if keep:
      return out
    if jax.process_count() > 1:
      out = multihost_utils.process_allgather(out, tiled=True)
    return jax.tree.map(np.asarray, out)

  return predict
