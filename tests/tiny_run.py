"""The tiny VQA run that the tests of the train loop share: its config, tokenizer and data."""

import importlib.util
import os
import pathlib
import re

import jax
import numpy as np

from mplug_jax import data
from mplug_jax.data import pipeline, sources, tokenizer as tokenizers

ROOT = pathlib.Path(__file__).parent.parent


def environment(devices):
  """Environment of a subprocess with this many virtual CPU devices, compiling as the tests do."""
  flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
  return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def config(arg="tiny", **changes):
  """configs/vqa.py with `arg`; `changes` are written section__field=value."""
  spec = importlib.util.spec_from_file_location("vqa_config", ROOT / "configs" / "vqa.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config(arg)
  c.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return c


def tokenizer(folder, c):
  """A SentencePiece model fitted to the training texts, in `folder`."""
  tokenizers.train_sentencepiece(sources.texts(sources.get(c.data, "train")), c.tokenizer.vocab_size, folder)
  return tokenizers.load(folder)


def batch(c, tokenizer):
  """The first training batch, numpy, with some questions made invalid so that rows count unequally."""
  source = sources.get(c.data, "train")
  batches = pipeline.train_batches(source, data.make_transform(c, tokenizer, train=True), batch_size=c.batch_size, seed=c.seed, threads=0)
  out = {k: np.array(v) for k, v in next(batches).items()}
  batches.close()
  for row in range(c.batch_size):
    out["question_valid"][row, row % c.data.questions_per_image + 1:] = False
  out["answer_weight"] *= out["question_valid"][..., None] * np.linspace(0.25, 1.0, c.batch_size, dtype=np.float32)[:, None, None]
  return out


def flat(tree):
  """Pytree -> {path: numpy array}; a random key as its integers."""
  def numpy(x):
    return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): numpy(x) for path, x in jax.tree.leaves_with_path(tree)}


def assert_gradients_equal(ours, reference):
  """The bound on what a mesh may change: 1e-4 of each tensor's largest value, or 1e-7. Both are {path: array}."""
  assert ours.keys() == reference.keys()
  for name, expected in reference.items():
    bound = max(1e-4 * np.abs(expected).max(), 1e-7)
    assert np.abs(ours[name] - expected).max() <= bound, name
