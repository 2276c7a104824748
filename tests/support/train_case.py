"""The run that the tests of the train loop share."""

import contextlib
import io
import json
import os

import jax
import numpy as np
import pytest

from mplug_jax.checkpoints import manager as checkpoint
from mplug_jax.data.text import tokenizer as tokenizer_lib
from mplug_jax.reporting import progress
from mplug_jax.tasks import vqa
from mplug_jax.training import loop
from tests.support import tiny_run

STEPS = 6
BUILDS = {}  # by configuration
EVALUATED = []  # parameters of the calls of predict functions


SETTINGS = {
  "total_steps": STEPS,
  "log_every": 1,
  "checkpoint.every": 2,
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


def make_settings(compilation):
  """Function (changes) -> the config of these tests.

  Dropout, averages, flips and RandAugment are on, and an evaluation runs half way.
  """

  def make(**changes):
    c = tiny_run.config()
    c.update_from_flattened_dict(SETTINGS | {"compilation_cache": compilation})
    c.update_from_flattened_dict(
      {name.replace("__", "."): value for name, value in changes.items()}
    )
    return c

  return make


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


def assert_same_run(config, ours, reference):
  state, extra = saved_state(config, ours)
  expected, expected_extra = saved_state(config, reference)
  assert state.keys() == expected.keys()
  assert extra == expected_extra
  for name, x in expected.items():
    assert state[name].dtype == x.dtype, name
    assert state[name].tobytes() == x.tobytes(), name
  assert tiny_run.lines(ours) == tiny_run.lines(reference)
  for name in ("predictions.json", "result.json"):
    assert (ours / name).read_bytes() == (reference / name).read_bytes()


def one_device_runs():
  """Runs use one of the eight devices, and runs of equal configuration share traced functions."""
  original = loop.build

  def build(config, tokenizer, *steps):
    keys = ("task", "model", "tokenizer", "data", "optim", "ema", "mesh", "seed", "batch_size")
    key = (
      json.dumps([json.loads(config.to_json_best_effort())[k] for k in keys]),
      tokenizer.fingerprint,
      steps,
    )
    if key not in BUILDS:
      count = abs(config.mesh.data * config.mesh.fsdp * config.mesh.tensor)
      BUILDS[key] = original(config, tokenizer, *steps, devices=jax.devices()[:count])

    def recorded(predict):
      def call(params, batch):
        EVALUATED.append(params)
        return predict(params, batch)

      return call

    return BUILDS[key]._replace(
      predict={name: recorded(predict) for name, predict in BUILDS[key].predict.items()}
    )

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "build", build)
    yield
  BUILDS.clear()
  EVALUATED.clear()
