"""Gradients of a task on any mesh, in any number of microbatches."""

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax import tasks
from mplug_jax.models.factory import build_model
from mplug_jax.parallel import batches, rules
from mplug_jax.parallel import mesh as mesh_lib
from mplug_jax.training import build as build_lib
from mplug_jax.training import gradients as gradients_lib
from mplug_jax.training import state as state_lib


def light_build(config, tokenizer):
  """Returns a Build of one device for gradients alone, in a third of the time of `build`.

  It has neither optimizer nor train step, and no predict function is traced.
  """
  task = tasks.get(config.task.name)(build_model(config, tokenizer), config, tokenizer)
  mesh = mesh_lib.make_mesh(dict.fromkeys(mesh_lib.AXES, 1), jax.devices()[:1])

  def init():
    params = task.init(jax.random.key(0), jax.tree.map(zeros, task.batch_spec(1)))
    averages = params if config.ema.decay else ()
    return state_lib.TrainState(
      jnp.int32(0), params, (), averages, task.init_extra(), jax.random.key(0)
    )

  def zeros(x):
    return jnp.zeros(x.shape, x.dtype)

  return build_lib.Build(task, mesh, {}, None, state_lib.abstract_state(init, mesh), None, {})


def on_mesh(built, shape):
  """Returns a Build of one device on a mesh of this shape, without tracing anything again.

  Its functions stay those of one device.
  """
  mesh = mesh_lib.make_mesh(dict(zip(mesh_lib.AXES, shape)), jax.devices()[: np.prod(shape)])
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    built.abstract,
    rules.shardings_for(built.abstract, built.abstract.params, mesh),
  )
  return built._replace(mesh=mesh, abstract=abstract)


def place(state, abstract):
  """Puts a state of numpy arrays and a random key on the devices that `abstract` names."""
  return jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), state, abstract)


class MeshCase:
  """Compares gradients of one task on meshes.

  Subclasses set config, tokenizer, built (for one device), state (on the host) and batch (numpy).
  """

  _compiled = None

  @property
  def rng(self):
    """Random key of the states on a mesh."""
    return jax.random.key(3)

  def place(self, shape=(1, 1, 1), state=None):
    """Returns a state of numpy arrays, by default that of the case, on a mesh."""
    state = (self.state if state is None else state).replace(rng=self.rng)
    abstract = on_mesh(self.built, shape).abstract
    return place(state, abstract if state.opt_state else abstract.replace(opt_state=()))

  def gradients(self, shape=(1, 1, 1), parts=1, batch=None, state=None):
    """-> (gradients, loss, {metric: (sum, count)}); `state` is a placed one."""
    return self.gradients_and_extra(shape, parts, batch, state)[:3]

  def gradients_and_extra(self, shape=(1, 1, 1), parts=1, batch=None, state=None):
    """Returns what `gradients` returns and the new extra state."""
    self._compiled = {} if self._compiled is None else self._compiled
    built = on_mesh(self.built, shape)
    with jax.set_mesh(built.mesh):
      state = self.place(shape) if state is None else state
      placed = batches.put_batch(self.batch if batch is None else batch, built.mesh)
      if (shape, parts) not in self._compiled:
        self._compiled[shape, parts] = (
          jax.jit(gradients_lib.make_gradients(built.task, parts)).lower(state, placed).compile()
        )
      return jax.device_get(self._compiled[shape, parts](state, placed))
