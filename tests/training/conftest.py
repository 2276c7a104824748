"""Runs that the tests of the train loop share."""

import shutil
import signal

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
def recorded(one_device):
  """Runs on one device; EVALUATED keeps the parameters of every evaluation."""
  build = loop.build

  def record(predict):
    def call(params, batch):
      EVALUATED.append(params)
      return predict(params, batch)

    return call

  def recording(*args):
    built = build(*args)
    return built._replace(predict={name: record(f) for name, f in built.predict.items()})

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "build", recording)
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
