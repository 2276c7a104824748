"""A tiny Predictor of any config, with parameters wide enough for answers to differ."""

import runpy

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mplug_jax import tasks
from mplug_jax.data.text import sentencepiece, tokenizer_base, wordpiece
from mplug_jax.inference.checkpoint import Restored
from mplug_jax.inference.predictor import Predictor
from mplug_jax.models.factory import build_model
from mplug_jax.parallel import mesh as mesh_lib
from tests.support import random_state, tiny_run

WORDS = (
  "what is the blue shape ? there a circle not red in image yes no on of left two dog "
  "<person> , . -"
)


def config(name, **changes):
  """configs/<name>.py:tiny; `changes` are written section__field=value."""
  c = runpy.run_path(str(tiny_run.ROOT / "configs" / f"{name}.py"))["get_config"]("tiny").unlock()
  c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return c


def predictor(folder, name, **changes):
  """The Predictor of `config`, with a tokenizer of the WORDS in `folder`."""
  c = config(name, **changes)
  if c.tokenizer.kind == "wordpiece":
    tokenizer = wordpiece.WordPieceTokenizer(
      "\n".join([*tokenizer_base.SPECIAL_TOKENS, *WORDS.split(), "##s", "##h"]).encode()
    )
  else:
    tokenizer = sentencepiece.train_sentencepiece(
      WORDS.split(), 400, folder, sentencepiece.location_names(c.tokenizer.locations)
    )
  model, mesh = (
    build_model(c, tokenizer),
    mesh_lib.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]),
  )
  task = tasks.get(c.task.name)(model, c, tokenizer)
  shapes = jax.eval_shape(
    lambda: task.init(
      jax.random.key(0), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), task.batch_spec(2))
    )
  )
  params = jax.tree.map(jnp.asarray, random_state.params(shapes, 0.2))
  return Predictor(Restored(f"runs/{name}", c, tokenizer, model, mesh, params), batch_size=4)


def photograph(path, width, height):
  """A picture of no square shape, saved without loss."""
  pixels = np.random.default_rng(width).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
  Image.fromarray(pixels).resize((width, height), Image.BICUBIC).save(path)
  return path
