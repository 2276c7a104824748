"""A small model with random parameters."""

import jax
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


def shapes(model, forward, *args):
  """Shapes of the parameters that `forward` uses."""
  return jax.eval_shape(lambda: model.init(jax.random.key(0), *args, method=forward))["params"]


def random_params(model, forward, *args):
  """Random parameters of the modules that `forward` uses; biases are not 0, scales not 1."""
  return drawn(shapes(model, forward, *args))


def drawn(shapes):
  """Random parameters of these shapes as numpy arrays."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    values = rng.normal(size=leaf.shape) * 0.5 + (path[-1].key == "scale")
    return values.astype(np.float32)

  return jax.tree.map_with_path(draw, shapes)


def apply(model, forward, **rngs):
  return jax.jit(
    lambda params, *args: model.apply({"params": params}, *args, method=forward, rngs=rngs)
  )


def fused(m, image, question):
  mask = question != PAD
  return m.fuse(m.encode_text(question, mask), mask, m.encode_image(image))


def answer(m, image, question, answers):
  """Runs the whole model.

  Args:
    m: the model.
    image: [B, ...].
    question: [B, Q, L].
    answers: [B, Q, A, T].

  Returns:
    Logits [B, Q, A, T, V], image tokens before fusion, image and text tokens after it.
  """
  flat = question.reshape(-1, question.shape[-1])
  mask, before = flat != PAD, m.encode_image(image)
  image, text = m.fuse(m.encode_text(flat, mask), mask, before)
  ids = answers.reshape(-1, answers.shape[-1])
  logits = m.decode(ids, ids != PAD, m.memory(image, text, mask))
  return logits.reshape(*answers.shape, -1), before, image, text


def texts(rng, *shape):
  """Random ids, each text padded beyond a random length of at least 2."""
  ids = rng.integers(4, 23, shape)
  return np.where(
    np.arange(shape[-1]) < rng.integers(2, shape[-1] + 1, shape[:-1])[..., None], ids, PAD
  ).astype(np.int32)


class Case:
  """A model, its random parameters, and `outputs`: the compiled `answer`."""

  def __init__(self, inputs, **changes):
    self.model = MPlug(**GEOMETRY | changes)
    self.shapes = shapes(self.model, answer, *inputs)
    self.params = drawn(self.shapes)
    self.outputs = apply(self.model, answer)

  def answer(self, *inputs):
    """Returns the logits as a numpy array."""
    return np.asarray(self.outputs(self.params, *inputs)[0])
