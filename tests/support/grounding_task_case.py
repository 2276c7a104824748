"""The tiny grounding task on any number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax import data
from mplug_jax.data import pipeline
from mplug_jax.parallel import batches as batches_lib
from mplug_jax.training import gradients as gradients_lib
from mplug_jax.training import loop
from tests.support import random_state, tiny_run
from tests.support.grounding_files import config


class Made:
  """The tiny task with the official box weights, a state and a batch with invalid rows."""

  def __init__(self, tokenizer):
    self.config = config(
      model__initializer_range=0.1,
      task__box_weights="per_example",
      task__rounding="down",
      data__expressions_per_image=2,
      optim__schedule__name="constant",
    )
    self.tokenizer = tokenizer
    batches = pipeline.train_batches(
      data.get_source(self.config, "train"),
      data.make_transform(self.config, tokenizer, train=True),
      batch_size=8,
      seed=0,
      threads=0,
    )
    self.batch = {k: np.array(v) for k, v in next(batches).items()}
    batches.close()
    self.batch["valid"][0, 1] = self.batch["valid"][5, 0] = False
    self.built = self.build()
    self.state = random_state.host_state(self.built, self.config.model.initializer_range)
    self.task = self.built.task
    self.locate = self.built.predict["locate"]
    self.locations = np.array([tokenizer.token_id(f"<bin{i}>") for i in range(97)])
    self._compiled = {}

  def build(self, devices=1, **changes):
    c = self.config.copy_and_resolve_references()
    c.update_from_flattened_dict(
      {"mesh.data": devices, **{k.replace("__", "."): v for k, v in changes.items()}}
    )
    return loop.build(c, self.tokenizer, 10, 10, jax.devices()[:devices])

  def gradients(self, built, microbatches=1, batch=None):
    """-> ({path: gradient}, loss, {metric: (sum, count)})."""
    function = self._compiled.setdefault(
      (id(built), microbatches), jax.jit(gradients_lib.make_gradients(built.task, microbatches))
    )
    state = jax.tree.map(
      lambda x, a: jax.device_put(jnp.asarray(x), a.sharding),
      self.state.replace(rng=jax.random.key(3)),
      built.abstract,
    )
    with jax.set_mesh(built.mesh):
      out = function(state, batches_lib.put_batch(batch or self.batch, built.mesh))
    return tiny_run.flat(out[0]), float(out[1]), jax.device_get(out[2])

  @functools.cached_property
  def decoded(self):
    """Returns the decoder's logits f32[R, 4, 97] of the locations, for bins i32[R, 4]."""
    begin = self.tokenizer.token_id("<box>")

    def forward(module, batch, inputs):
      return module.decode(inputs, jnp.ones(inputs.shape, bool), self.task.encode(module, batch))

    function = jax.jit(
      lambda params, batch, inputs: self.task.apply(params, forward, batch, inputs)[
        :, :4, self.locations
      ]
    )

    def call(batch, numbers):
      inputs = np.concatenate([np.full((len(numbers), 1), begin), self.locations[numbers]], axis=1)
      return np.asarray(function(self.state.params, batch, inputs))

    return call
