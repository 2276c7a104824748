"""Gradients of a task on any mesh, in any number of microbatches."""

import jax
import numpy as np
import optax

from mplug_jax import optim
from mplug_jax.parallel import batches, rules
from mplug_jax.parallel import mesh as mesh_lib
from mplug_jax.training import gradients as gradients_lib


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


# Settings of config.optim with which a case overfits a batch.
FIT = {
  "optim__name": "adamw",
  "optim__schedule__name": "constant",
  "optim__lr": 1e-3,
  "optim__b2": 0.98,
  "optim__weight_decay": 0.0,
}


class MeshCase:
  """Compares gradients of one task on meshes.

  Subclasses set config, tokenizer, built (for one device), state (on the host) and batch (numpy).
  """

  _compiled = None
  _forward = None

  @property
  def rng(self):
    """Random key of the states on a mesh."""
    return jax.random.key(3)

  def place(self, shape=(1, 1, 1), state=None):
    """Returns a state of numpy arrays, by default that of the case, on a mesh."""
    state = (self.state if state is None else state).replace(rng=self.rng)
    abstract = on_mesh(self.built, shape).abstract
    if not state.opt_state:  # gradients need none
      state, abstract = (x.replace(opt_state=()) for x in (state, abstract))
    return place(state, abstract)

  def gradients(self, shape=(1, 1, 1), parts=1, batch=None, state=None):
    """-> (gradients, loss, {metric: (sum, count)}); `state` is a placed one."""
    return self.gradients_and_extra(shape, parts, batch, state)[:3]

  def gradients_and_extra(self, shape=(1, 1, 1), parts=1, batch=None, state=None):
    """Returns what `gradients` returns and the new extra state."""
    built = on_mesh(self.built, shape)
    with jax.set_mesh(built.mesh):
      state = self.place(shape) if state is None else state
      placed = batches.put_batch(self.batch if batch is None else batch, built.mesh)
      return jax.device_get(self._program(shape, parts, state, placed)(state, placed))

  def _program(self, shape, parts, state, placed):
    self._compiled = {} if self._compiled is None else self._compiled
    if (shape, parts) not in self._compiled:
      self._compiled[shape, parts] = (
        jax.jit(gradients_lib.make_gradients(self.built.task, parts)).lower(state, placed).compile()
      )
    return self._compiled[shape, parts]

  def forward(self, params, **changes):
    """-> what `forward` of the task returns for the batch with some changes, and parameters."""
    if self._forward is None:
      self._forward = jax.jit(lambda p, b: self.built.task.apply(p, self.built.task.forward, b))
    return jax.device_get(self._forward(params, self.batch | changes))

  def train(self, batch, updates, goal=-np.inf, state=None):
    """Trains on one batch -> (parameters, last loss).

    The gradients are those of the program that `gradients` runs on one device, so that no other is
    compiled; the optimizer is that of the config.

    Args:
      batch: batch with the shapes of that of the case.
      updates: number of updates.
      goal: loss at which training stops; looked at every ten updates.
      state: first state, numpy arrays; by default that of the case.
    """
    optimizer, _ = optim.make(self.config.optim, self.built.abstract.params, updates, updates)

    @jax.jit
    def update(grads, opt_state, params):
      changes, opt_state = optimizer.update(grads, opt_state, params, ok=True)
      return optax.apply_updates(params, changes), opt_state

    mesh = on_mesh(self.built, (1, 1, 1)).mesh
    with jax.set_mesh(mesh):
      state = self.place(state=state)
      placed = batches.put_batch(batch, mesh)
      gradients, loss = self._program((1, 1, 1), 1, state, placed), np.inf
      for step in range(updates):
        grads, loss, *_ = gradients(state, placed)
        if step % 10 == 9 and float(loss) < goal:
          break
        params, opt_state = update(grads, state.opt_state, state.params)
        state = state.replace(params=params, opt_state=opt_state)
    return state.params, float(loss)

  def overfit(self, batch, limit, state=None):
    """Trains on one batch until the loss is below 0.01 -> parameters.

    Args:
      batch: batch with the shapes of that of the case.
      limit: updates after which the loss must be that low.
      state: see `train`.
    """
    params, loss = self.train(batch, limit, 0.01, state)
    assert loss < 0.01
    return params
