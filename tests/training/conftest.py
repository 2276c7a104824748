"""Runs that the tests of the train loop share."""

import json
import shutil
import signal

import jax
import pytest

from mplug_jax.training import loop
from tests.support import tiny_run
from tests.support.train_case import EVALUATED, SETTINGS, run, send_at


@pytest.fixture(scope="module")
def settings():
  """Function (changes) -> the config of these tests.

  Dropout, averages, flips and RandAugment are on, and an evaluation runs half way.
  """

  def make(**changes):
    c = tiny_run.config()
    c.update_from_flattened_dict(SETTINGS)
    c.update_from_flattened_dict(
      {name.replace("__", "."): value for name, value in changes.items()}
    )
    return c

  return make


@pytest.fixture(scope="module")
def shared_builds():
  """Runs use one of the eight devices, and runs of equal configuration share traced functions."""
  original = loop.build
  builds = {}

  def build(config, tokenizer, *steps):
    keys = ("task", "model", "tokenizer", "data", "optim", "ema", "mesh", "seed", "batch_size")
    key = (
      json.dumps([json.loads(config.to_json_best_effort())[k] for k in keys]),
      tokenizer.fingerprint,
      steps,
    )
    if key not in builds:
      count = abs(config.mesh.data * config.mesh.fsdp * config.mesh.tensor)
      builds[key] = original(config, tokenizer, *steps, devices=jax.devices()[:count])

    def recorded(predict):
      def call(params, batch):
        EVALUATED.append(params)
        return predict(params, batch)

      return call

    return builds[key]._replace(
      predict={name: recorded(predict) for name, predict in builds[key].predict.items()}
    )

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "build", build)
    yield
  EVALUATED.clear()


@pytest.fixture(scope="module")
def stopped(settings, tmp_path_factory):
  """The same run, which got SIGTERM during its third update: (folder, what it printed)."""
  folder = tmp_path_factory.mktemp("stopped")
  with pytest.MonkeyPatch.context() as patch:
    send_at(patch, signal.SIGTERM, 3)
    status, out = run(settings(), folder)
  assert status == 0
  return folder, out


@pytest.fixture
def copy(stopped, tmp_path):
  """A copy of the stopped run, to resume."""
  return shutil.copytree(stopped[0], tmp_path / "run")
