"""Gradients of a task on any mesh, in any number of microbatches."""

import jax
import numpy as np
import pytest

from mplug_jax import tasks
from mplug_jax.parallel import batches, rules
from mplug_jax.parallel import mesh as mesh_lib
from mplug_jax.training import build as build_lib
from mplug_jax.training import gradients as gradients_lib


def build(*args):
  """Returns training.build.build(*args) without predict functions, which take long to trace."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tasks.get(args[0].task.name), "predict_fns", lambda self: {})
    return build_lib.build(*args)


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
