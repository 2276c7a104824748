"""The train state: everything that an update reads and writes, created sharded over the mesh."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, PRNGKeyArray

from mplug_jax.parallel import rules
from mplug_jax.tasks.base import Params


class TrainState(struct.PyTreeNode):
  """Parameters and the state beside them, pytrees of arrays on the mesh.

  Attributes:
    step: i32[], number of updates done.
    params: parameters, float32.
    opt_state: state of the optimizer.
    ema_params: moving averages of the parameters, or () without them.
    extra: state of the task, such as queues, or ().
    rng: key[], which never changes; random numbers come from fold_in(rng, step).
  """

  step: Any
  params: Any
  opt_state: Any
  ema_params: Any
  extra: Any
  rng: Any


def make_init(
  init_params: Callable[[PRNGKeyArray], Params],
  optimizer: optax.GradientTransformation,
  init_extra: Callable[[], Any],
  seed: int,
  ema: bool,
) -> Callable[[], TrainState]:
  """Returns a function () -> TrainState, to be jitted with the shardings of `abstract_state`.

  Args:
    init_params: function random key -> parameters.
    optimizer: optimizer of the run.
    init_extra: function () -> state of the task.
    seed: seed of the run.
    ema: whether to keep averaged parameters, equal to the parameters at the start.
  """

  def init() -> TrainState:
    params_rng, state_rng = jax.random.split(jax.random.key(seed))
    params = init_params(params_rng)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=optimizer.init(params),
      ema_params=jax.tree.map(jnp.copy, params) if ema else (),
      extra=init_extra(),
      rng=state_rng,
    )

  return init


def abstract_state(init: Callable[[], TrainState], mesh: jax.sharding.Mesh) -> TrainState:
  """Returns the TrainState as ShapeDtypeStructs with shardings, without computing anything.

  Args:
    init: function () -> TrainState.
    mesh: device mesh.
  """
  shapes = jax.eval_shape(init)
  shardings = rules.shardings_for(shapes, shapes.params, mesh)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )


def shardings_of(tree: Any) -> Any:
  """Returns the tree of shardings.

  Args:
    tree: pytree of arrays or ShapeDtypeStructs.
  """
  return jax.tree.map(lambda x: x.sharding, tree)


def blend_ema(
  ema_params: Params, params: Params, decay: float | Float[Array, ""], include: str
) -> Params:
  """Updates moving averages: decay x average + (1 - decay) x parameter.

  Args:
    ema_params: averages.
    params: parameters of the same tree.
    decay: decay of the averages.
    include: regex; averages whose path it does not match anywhere are unchanged. The released code
      leaves out the fusion encoder (docs/official.md item 5).
  """
  pattern = re.compile(include)

  def blend(path, average, new):
    if not pattern.search(rules.path_name(path)):
      return average
    return decay * average + (1.0 - decay) * new

  return jax.tree.map_with_path(blend, ema_params, params)
