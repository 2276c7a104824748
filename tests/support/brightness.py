"""A task of its own for tests/test_extending.py: how bright is a gray image?

This module is all that a new task needs: the examples (get_source, texts, make_transform), the
task and the evaluator. The test adds one row for each to the tables of the package.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.evaluators import common
from mplug_jax.tasks import base

WORDS = ("dark", "bright")

# ---- examples


def get_source(data, split):
  """Gray images; config.data.size of them, darkest first."""
  del split
  levels = np.linspace(0, 255, data.size, dtype=np.uint8)
  return [{"level": level, "image": np.full((8, 8, 3), level)} for level in levels]


def texts(source, records=0):
  """Texts to fit a tokenizer to."""
  del source, records
  return iter(WORDS)


def make_transform(config, tokenizer, train):
  """Function (index, record, rng) -> example."""
  del tokenizer, train
  size = config.model.image_size

  def transform(index, record, rng):
    del rng
    return {
      "image": np.full((size, size, 3), record["level"]),
      "level": np.float32(record["level"] / 127.5 - 1),
      "corrupt": np.False_,
      "index": np.int32(index),
    }

  return transform


# ---- task


class BrightnessTask(base.Task):
  """Squared error of the first contrastive feature of the image."""

  def batch_spec(self, batch_size):
    image = base.image_shape(self.config, self.model.image_size)
    return {
      "image": jax.ShapeDtypeStruct((batch_size, *image), jnp.uint8),
      "level": jax.ShapeDtypeStruct((batch_size,), jnp.float32),
      "corrupt": jax.ShapeDtypeStruct((batch_size,), bool),
      "index": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
      "mask": jax.ShapeDtypeStruct((batch_size,), bool),
    }

  def forward(self, module, batch):
    feature, _ = base.contrastive_features(module, base.encode_image(module, batch["image"]), None)
    return feature[:, 0]

  def loss_normalizers(self, batch, rng):
    return {"square": batch["mask"].sum(dtype=jnp.float32)}

  def loss(self, params, state, batch, rng):
    level = self.apply(params, self.forward, batch, rng=rng)
    total = jnp.square(level - batch["level"]).sum()
    return {"square": total}, {}, state.extra

  def predict_fns(self):
    return {"level": lambda params, batch: {"level": self.apply(params, self.forward, batch)}}


# ---- evaluator


class BrightnessEvaluator:
  """Share of the images that are told apart from medium gray in the right direction."""

  metric = "accuracy"

  def __init__(self, config, tokenizer, workdir):
    del tokenizer, workdir
    self.config = config
    self.source = get_source(config.data, config.eval.split)
    self.transform = make_transform(config, None, train=False)
    self.samples = []

  def run(self, predict, process_index=0, process_count=1):
    rows = common.rows(
      self.config, self.source, self.transform, predict["level"], process_index, process_count
    )
    right = [(out["level"] > 0) == (self.source[index]["level"] > 127) for index, out, _ in rows]
    return {"accuracy": 100 * float(np.mean(right)), "images": len(right)}
