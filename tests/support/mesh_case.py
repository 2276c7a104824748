"""Gradients of a task on any mesh, in any number of microbatches."""

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.parallel import batches
from mplug_jax.training import gradients as gradients_lib
from mplug_jax.training import loop


class MeshCase:
  """Compares gradients of one task on meshes.

  Subclasses set config, tokenizer, built (for one device), state (on the host, without rng) and
  batch (numpy).
  """

  _compiled = None

  def gradients(self, shape=(1, 1, 1), parts=1, batch=None):
    """-> (gradients, loss, {metric: (sum, count)})."""
    self._compiled = {} if self._compiled is None else self._compiled
    built = self.built
    if np.prod(shape) > 1:
      c = self.config.copy_and_resolve_references()
      c.mesh.data, c.mesh.fsdp, c.mesh.tensor = shape
      built = loop.build(c, self.tokenizer, 10, 10, jax.devices()[: np.prod(shape)])
    with jax.set_mesh(built.mesh):
      state = self.state.replace(rng=jax.random.key(3))
      state = jax.tree.map(
        lambda x, a: jax.device_put(jnp.asarray(x), a.sharding), state, built.abstract
      )
      placed = batches.put_batch(self.batch if batch is None else batch, built.mesh)
      if (shape, parts) not in self._compiled:
        self._compiled[shape, parts] = (
          jax.jit(gradients_lib.make_gradients(built.task, parts)).lower(state, placed).compile()
        )
      return jax.device_get(self._compiled[shape, parts](state, placed)[:3])
