"""The tiny grounding task: one tokenizer, one case and one set of programs for all its tests.

Files that import this module run in one process, see tests/conftest.py.
"""

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax import data
from mplug_jax.data import pipeline
from mplug_jax.data.text import sentencepiece
from mplug_jax.training.build import build_for_evaluation
from tests.support import grounding_files, mesh_case, random_state, shared_builds, tiny_run


def config(arg="tiny", **changes):
  """Config of runs that share their programs, whatever they read."""
  return grounding_files.config(
    arg,
    **{
      "compilation_cache": "",
      "tokenizer__records": 100,
      "data__expressions_per_image": 2,
      "data__max_phrase": 22,
      "optim__name": "adamw",
      "optim__lr": 3e-3,
      "optim__schedule__name": "constant",
      "optim__weight_decay": 0.0,
      "optim__b2": 0.99,
      **changes,
    },
  )


@functools.cache
def tokenizer():
  """The tokenizer that a run of `config` fits."""
  c = config()
  with tempfile.TemporaryDirectory() as folder:
    return sentencepiece.train_sentencepiece(
      data.texts(c, None),
      c.tokenizer.vocab_size,
      folder,
      sentencepiece.location_names(c.tokenizer.locations),
    )


def build():
  """Build of the runs, on one device."""
  return shared_builds.build(config(), tokenizer())


@functools.cache
def case():
  return GroundingCase()


class GroundingCase(mesh_case.MeshCase):
  """The tiny task with the official box weights, a state and a batch with invalid rows."""

  reference = (8, 1, 1)  # devices of the results that others are compared with

  def __init__(self):
    self.config = config(task__box_weights="per_example", task__rounding="down")
    self.tokenizer = tokenizer()
    batches = pipeline.train_batches(
      data.get_source(self.config, "train"),
      data.make_transform(self.config, self.tokenizer, train=True),
      batch_size=8,
      seed=0,
      threads=0,
    )
    self.batch = {k: np.array(v) for k, v in next(batches).items()}
    batches.close()
    self.batch["valid"][0, 1] = self.batch["valid"][5, 0] = False
    self.built = build_for_evaluation(self.config, self.tokenizer, jax.devices()[:1])
    self.state = random_state.host_state(self.built, self.config.model.initializer_range)
    self.task = self.built.task
    self.locate = build().predict["locate"]  # reads neither weights nor rounding but for "nearest"
    self.locations = np.array([self.tokenizer.token_id(f"<bin{i}>") for i in range(97)])

  def results(self, shape=reference, parts=1, batch=None):
    """-> ({path: gradient}, loss, {metric: (sum, count)}), in so many microbatches."""
    gradients, *rest = self.gradients(shape, parts, batch)
    return tiny_run.flat(gradients), *rest

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
