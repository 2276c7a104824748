"""Run folders with random weights for the tests of Predictor."""

import runpy

import jax
import numpy as np
from flax import traverse_util

from mplug_jax import config as config_lib
from mplug_jax import tasks
from mplug_jax.checkpoints import manager as checkpoint
from mplug_jax.data.text import sentencepiece
from mplug_jax.models import factory
from tests.support import tiny_run

# Whole words for the vocabulary, and every letter.
_TEXTS = 4 * (
  "is there a red circle left of the small blue square",
  "what color is the triangle",
  "what shape is above the yellow star",
  "how many green objects are there",
  "exactly one image shows both",
  "does the image contain it",
  "a quick fox vexes zebras",
)


def config(name, arg="tiny", **changes):
  """configs/<name>.py at the tiny size; scenes of 48 pixels."""
  c = runpy.run_path(str(tiny_run.ROOT / "configs" / f"{name}.py"))["get_config"](arg)
  c = c.copy_and_resolve_references().unlock()
  if c.data.name == "scenes":
    c.data.size = c.model.image_size = 48
  c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return c


def save(folder, c, seed=0, sharpness=2.0):
  """Writes a run folder of the config with random parameters; returns the folder.

  Kernels keep the size of what goes through them, times `sharpness`, so that inputs differ in
  scores by more than the rounding of float32.
  """
  tokenizer = sentencepiece.train_sentencepiece(
    _TEXTS,
    c.tokenizer.vocab_size,
    folder / "tokenizer",
    sentencepiece.location_names(c.tokenizer.locations),
  )
  task = tasks.get(c.task.name)(factory.build_model(c, tokenizer), c, tokenizer)
  shapes = jax.eval_shape(task.init, jax.random.key(0), task.batch_spec(1))
  rng, params = np.random.default_rng(seed), {}
  for name, leaf in sorted(traverse_util.flatten_dict(shapes, sep="/").items()):
    values = rng.standard_normal(leaf.shape, np.float32)
    if name.endswith("scale"):
      values = np.ones_like(values)
    elif name.endswith("kernel"):
      values *= sharpness * leaf.shape[-2] ** -0.5
    elif name == "temp/value":
      values = np.full_like(values, 0.07)
    params[name] = values
  manager = checkpoint.Manager(folder)
  manager.save(
    0,
    {"params": traverse_util.unflatten_dict(params, sep="/")},
    {"tokenizer": tokenizer.fingerprint},
  )
  manager.close()
  (folder / "config.json").write_text(config_lib.to_json(c))
  return folder
