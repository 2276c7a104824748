"""config.model.loss_chunk changes no loss and no gradient of any task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax import data
from mplug_jax.data.text import sentencepiece
from mplug_jax.data.text import tokenizer as tokenizer_lib
from mplug_jax.parallel import batches
from mplug_jax.training import gradients as gradients_lib
from mplug_jax.training import loop
from tests.support import random_state, retrieval_files, tiny_run


def gradients(c, tokenizer, batch, shape, chunk):
  """-> ({path: gradient}, loss, {metric: (sum, count)})."""
  c = c.copy_and_resolve_references()
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = shape
  c.model.loss_chunk = chunk
  built = loop.build(c, tokenizer, 10, 10, jax.devices()[: np.prod(shape)])
  with jax.set_mesh(built.mesh):
    state, batch = (
      random_state.state(built, c.model.initializer_range),
      batches.put_batch(batch, built.mesh),
    )
    found, loss, metrics, _ = jax.jit(gradients_lib.make_gradients(built.task))(state, batch)
  return tiny_run.flat(jax.device_get(found)), float(loss), jax.device_get(metrics)


@pytest.mark.parametrize(
  "task", ["caption", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vqa", "pretrain"))]
)
def test_loss_and_gradients_are_those_without_chunks(task, tmp_path):
  """With vocabulary and rows spread over eight devices, against one device without chunks."""
  c = retrieval_files.config(
    "tiny" + ",data=scenes" * (task == "vqa"),
    task,
    model__dropout_rate=0.0,
    model__attention_dropout_rate=0.0,
    model__vision_attention_dropout_rate=0.0,
    model__initializer_range=0.1,
  )
  c.compilation_cache, c.tokenizer.vocab_size = "", 128
  sentencepiece.train_sentencepiece(
    data.texts(c, data.get_source(c, "train")), c.tokenizer.vocab_size, tmp_path
  )
  tokenizer = tokenizer_lib.load(tmp_path)
  batch = retrieval_files.first_batch(c, tokenizer)
  expected, expected_loss, expected_metrics = gradients(c, tokenizer, batch, (1, 1, 1), 0)
  found, loss, metrics = gradients(c, tokenizer, batch, (2, 2, 2), 3)
  assert loss == pytest.approx(expected_loss, rel=1e-5)
  tiny_run.assert_gradients_equal(found, expected)
  for name, pair in expected_metrics.items():
    np.testing.assert_allclose(metrics[name], pair, rtol=1e-5, err_msg=name)
  assert all(np.isfinite(x).all() for x in expected.values())
  assert jnp.isfinite(expected_loss)
