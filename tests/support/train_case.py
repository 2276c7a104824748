"""The run that the tests of the train loop share."""

import contextlib
import io
import os

import numpy as np

from mplug_jax.checkpoints import manager as checkpoint
from mplug_jax.data.text import tokenizer as tokenizer_lib
from mplug_jax.reporting import progress
from mplug_jax.tasks import vqa
from mplug_jax.training import loop
from tests.support import tiny_run

STEPS = 6
EVALUATED = []  # parameters of the calls of predict functions


SETTINGS = {
  "total_steps": STEPS,
  "log_every": 1,
  "compilation_cache": "",
  "checkpoint.every": 3,
  "eval.every": 3,
  "eval.limit": 10,
  "eval.batch_size": 8,
  "optim.schedule.name": "constant",
  "ema.decay": 0.9,
  "data.augment.scale": (0.5, 1.0),
  "data.augment.randaugment": (2, 7),
}


def run(config, workdir):
  """-> (exit status, what was printed)."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    status = loop.train(config, str(workdir))
  return status, out.getvalue()


def send_at(monkeypatch, number, step):
  """Sends a signal to this process when `step` updates are done."""
  update = progress.Progress.update

  def hooked(self, done, loss=None):
    if done == step and loss is None:
      os.kill(os.getpid(), number)
    return update(self, done, loss)

  monkeypatch.setattr(progress.Progress, "update", hooked)


def poison(monkeypatch, step):
  """Makes the answer weights of update number `step` (from 1) NaN."""

  def prepare(self, state, batch, host):
    if int(state.step) == step - 1:
      batch = batch | {"answer_weight": batch["answer_weight"] * np.nan}
    return batch

  monkeypatch.setattr(vqa.VqaTask, "prepare", prepare)


def saved_state(config, workdir, step=None):
  """{path: array} of a checkpoint, and what was saved with it."""
  tokenizer = tokenizer_lib.load(os.path.join(workdir, "tokenizer"))
  abstract = loop.build(config, tokenizer, STEPS, 4000 // config.batch_size).abstract
  with contextlib.closing(checkpoint.Manager(workdir)) as manager:
    state, extra = manager.restore(abstract, step)
  return tiny_run.flat(state), extra


_REFERENCES = {}  # {folder of a run that nothing changes: its last state}


def assert_same_run(config, ours, reference):
  if reference not in _REFERENCES:
    _REFERENCES[reference] = saved_state(config, reference)
  state, extra = saved_state(config, ours)
  expected, expected_extra = _REFERENCES[reference]
  assert state.keys() == expected.keys()
  assert extra == expected_extra
  for name, x in expected.items():
    assert state[name].dtype == x.dtype, name
    assert state[name].tobytes() == x.tobytes(), name
  assert tiny_run.lines(ours) == tiny_run.lines(reference)
  for name in ("predictions.json", "result.json"):
    assert (ours / name).read_bytes() == (reference / name).read_bytes()
