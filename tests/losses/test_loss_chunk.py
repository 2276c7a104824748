"""config.model.loss_chunk changes no loss and no gradient of any task."""

import copy

import jax
import numpy as np
import pytest

from mplug_jax import data
from mplug_jax.data.text import sentencepiece
from mplug_jax.data.text import tokenizer as tokenizer_lib
from mplug_jax.models.factory import build_model
from mplug_jax.training.build import build_for_evaluation
from tests.support import mesh_case, random_state, retrieval_files, tiny_run


class Case(mesh_case.MeshCase):
  """One state and batch of a task, and its gradients with and without chunks."""

  def __init__(self, c, tokenizer):
    self.config, self.tokenizer = c, tokenizer
    self.batch = retrieval_files.first_batch(c, tokenizer)
    self.built = build_for_evaluation(c, tokenizer, jax.devices()[:1])
    self.state = random_state.host_state(self.built, c.model.initializer_range)

  def with_chunk(self, chunk):
    """The same case with config.model.loss_chunk."""
    other, task = copy.copy(self), copy.copy(self.built.task)
    task.config = self.config.copy_and_resolve_references()
    task.config.model.loss_chunk = chunk
    task.model = build_model(task.config, self.tokenizer)
    other.built, other._compiled = self.built._replace(task=task), None
    return other


@pytest.mark.parametrize(
  "task", ["caption", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vqa", "pretrain"))]
)
def test_loss_and_gradients_are_those_without_chunks(task, tmp_path):
  """With vocabulary and rows spread over eight devices, against one device without chunks."""
  c = retrieval_files.config(
    "tiny" + ",data=scenes" * (task == "vqa"),
    task,
    **tiny_run.NO_DROPOUT,
    model__initializer_range=0.1,
  )
  c.compilation_cache, c.tokenizer.vocab_size, c.tokenizer.records = "", 128, 60
  sentencepiece.train_sentencepiece(
    data.texts(c, data.get_source(c, "train")), c.tokenizer.vocab_size, tmp_path
  )
  tokenizer = tokenizer_lib.load(tmp_path)
  case = Case(c, tokenizer)
  expected, expected_loss, expected_metrics = case.gradients()
  found, loss, metrics = case.with_chunk(3).gradients((2, 2, 2))
  found, expected = tiny_run.flat(found), tiny_run.flat(expected)
  assert loss == pytest.approx(expected_loss, rel=1e-5)
  tiny_run.assert_gradients_equal(found, expected)
  for name, pair in expected_metrics.items():
    np.testing.assert_allclose(metrics[name], pair, rtol=1e-5, err_msg=name)
  assert all(np.isfinite(x).all() for x in expected.values())
  assert np.isfinite(expected_loss)
