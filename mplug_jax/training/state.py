"""The train state: everything that an update reads and writes, born sharded over the mesh."""

import re
from typing import Any

import flax
import jax
import jax.numpy as jnp

from mplug_jax.parallel import rules


@flax.struct.dataclass
class TrainState:
  """Params and every state beside them are pytrees of arrays on the mesh.

  step: i32[], updates done. params: float32. opt_state: of the optimizer. ema_params: like params,
    or () when off.
  extra: of the task (queues), or (). rng: key[], never changed; draws come from fold_in(rng, step).
  """

  step: Any
  params: Any
  opt_state: Any
  ema_params: Any
  extra: Any
  rng: Any


def make_init(init_params, optimizer, init_extra, seed, ema):
  """Function () -> TrainState, to be jitted with the shardings of `abstract_state`.

  Args:
    init_params: key -> parameters. optimizer: optax.GradientTransformation. init_extra: () -> the
      task's state.
    ema: keep averaged parameters, equal to the parameters at the start.
  """

  def init():
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


def abstract_state(init, mesh):
  """Function () -> TrainState -> the same as ShapeDtypeStructs that carry their shardings.

  Nothing is computed.
  """
  shapes = jax.eval_shape(init)
  shardings = rules.shardings_for(shapes, shapes.params, mesh)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )


def shardings_of(tree):
  """Tree of ShapeDtypeStructs or arrays -> tree of their shardings."""
  return jax.tree.map(lambda x: x.sharding, tree)


def blend_ema(ema_params, params, decay, include):
  """Ema <- decay x ema + (1 - decay) x params, for the leaves whose path the regex `include` matches; others stay.

  docs/official.md item 5: the released code leaves the fusion encoder out.
  """
  pattern = re.compile(include)

  def blend(path, average, new):
    return (
      decay * average + (1.0 - decay) * new if pattern.search(rules.path_name(path)) else average
    )

  return jax.tree.map_with_path(blend, ema_params, params)
