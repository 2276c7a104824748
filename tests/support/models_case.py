"""A small model with random parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.models.mplug import MPlug

PAD = 3  # not 0 on purpose


GEOMETRY = dict(
  image_size=16,
  patch_size=8,
  vision_width=24,
  vision_layers=2,
  vision_heads=2,
  vocab_size=23,
  hidden_size=16,
  heads=2,
  mlp_dim=24,
  max_positions=12,
  text_layers=2,
  fusion_layers=2,
  stride=1,
  decoder_layers=2,
  pad_id=PAD,
  embed_dim=8,
)


def random_params(model, forward, *args):
  """Random parameters of the modules that `forward` uses; biases are not 0, scales not 1."""
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *args, method=forward))["params"]
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    return jnp.asarray(rng.normal(size=leaf.shape) * 0.5 + (path[-1].key == "scale"), jnp.float32)

  return jax.tree.map_with_path(draw, shapes)


def apply(model, forward, **rngs):
  return jax.jit(
    lambda params, *args: model.apply({"params": params}, *args, method=forward, rngs=rngs)
  )


def fused(m, image, question):
  mask = question != PAD
  return m.fuse(m.encode_text(question, mask), mask, m.encode_image(image))


def memory(m, image, question):
  """image: [B, ...]; question: [B, Q, L] -> Memory of B * Q rows."""
  flat = question.reshape(-1, question.shape[-1])
  return m.memory(*fused(m, image, flat), flat != PAD)


def answer(m, image, question, answers):
  """answers: [B, Q, A, T] -> logits [B, Q, A, T, V]."""
  flat = answers.reshape(-1, answers.shape[-1])
  return m.decode(flat, flat != PAD, memory(m, image, question)).reshape(*answers.shape, -1)


def texts(rng, *shape):
  """Random ids, each text padded beyond a random length of at least 2."""
  ids = rng.integers(4, 23, shape)
  return np.where(
    np.arange(shape[-1]) < rng.integers(2, shape[-1] + 1, shape[:-1])[..., None], ids, PAD
  ).astype(np.int32)


class Case:
  def __init__(self, inputs, **changes):
    self.model = MPlug(**GEOMETRY | changes)
    self.params = random_params(self.model, answer, *inputs)
    self.answer = apply(self.model, answer)
