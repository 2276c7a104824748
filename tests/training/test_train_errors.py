"""Errors of runs: another config or tokenizer, and configs that cannot train."""

import contextlib
import io
import json
import os
import shutil

import pytest

from mplug_jax.data.sources import vqa as sources
from mplug_jax.data.text import sentencepiece
from mplug_jax.data.text import tokenizer as tokenizer_lib
from mplug_jax.training import loop
from tests.support.train_case import run

pytestmark = pytest.mark.usefixtures("recorded")


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("model__dropout_rate", 0.2),
    ("task__max_length", 7),
    ("data__max_question", 20),
    ("batch_size", 16),
    ("seed", 1),
    ("tokenizer__vocab_size", 300),
  ],
)
def test_resuming_another_run_is_refused(name, value, settings, copy):
  before = (copy / "config.json").read_bytes()
  dotted = name.replace("__", ".")
  with pytest.raises(ValueError, match="holds a run of another configuration") as error:
    run(settings(**{name: value}), copy)
  message = str(error.value)
  assert message.startswith(f"{copy} holds a run of another configuration")
  assert f"{dotted}: " in message
  assert message.count("\n") == 0
  assert message.count(": ") == 1
  assert (copy / "config.json").read_bytes() == before


def test_other_differences_are_said(settings, copy, monkeypatch):
  class Reached(Exception):
    pass

  def stop(*args):
    raise Reached

  monkeypatch.setattr(loop, "prepare_tokenizer", stop)
  out = io.StringIO()
  with contextlib.redirect_stdout(out), pytest.raises(Reached):
    loop.train(settings(optim__lr=0.5, log_every=3), str(copy))
  assert out.getvalue().splitlines() == [
    "resuming with a difference: log_every: 1 -> 3",
    "resuming with a difference: optim.lr: 0.001 -> 0.5",
  ]
  assert json.loads((copy / "config.json").read_text())["optim"]["lr"] == 0.5


def test_another_tokenizer_is_refused(settings, copy):
  """One of the same size, so that every shape fits."""
  texts = sources.texts(sources.get(settings().data, "train"))
  swapped = [
    t.replace("red", "?").replace("blue", "red").replace("?", "blue") if t in ("red", "blue") else t
    for t in texts
  ]
  before = tokenizer_lib.load(copy / "tokenizer").vocab_size
  shutil.rmtree(copy / "tokenizer")
  sentencepiece.train_sentencepiece(swapped, settings().tokenizer.vocab_size, copy / "tokenizer")
  assert tokenizer_lib.load(copy / "tokenizer").vocab_size == before
  with pytest.raises(
    ValueError,
    match="The tokenizer .* is not the one recorded in the checkpoint in .*use the files saved "
    "there",
  ):
    run(settings(), copy)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(total_steps=0), "Set config.total_steps or config.total_epochs"),
    (dict(batch_size=6, mesh__data=8), "batch of 6 rows cannot be split .* multiple of"),
    (dict(optim__microbatches=3), "config.optim.microbatches=3"),
    (
      dict(optim__microbatches=4, mesh__data=8),
      "batch of 2 rows cannot be split .*config.optim.microbatches",
    ),
    (dict(model__vocab_size=50), "config.model.vocab_size=50 but the tokenizer has"),
    (
      dict(tokenizer__kind="bpe"),
      "config.tokenizer.kind='bpe' is not one of wordpiece, sentencepiece",
    ),
    (dict(task__name="vqaa"), "config.task.name='vqaa' is not a task; there are: .*vqa"),
  ],
)
def test_a_config_that_cannot_train_is_refused_in_one_sentence(
  changes, message, settings, tmp_path
):
  with pytest.raises(ValueError, match=message) as error:
    run(settings(**changes), tmp_path)
  assert "\n" not in str(error.value)
  assert not (tmp_path / "checkpoints").exists() or not os.listdir(tmp_path / "checkpoints")
