"""`python -m mplug_jax.main` as a subprocess of the tests.

Usage: main_worker.py <devices> <seconds> <flags of main>.

It uses the first <devices> of its devices (0: all, as main does) and sleeps <seconds> after every
update, so that a signal from outside comes while it trains.
"""

import sys
import time

import jax
from absl import app, logging

from mplug_jax import main
from mplug_jax.reporting import progress
from mplug_jax.training import loop


def _use_devices(count):
  build = loop.build
  loop.build = lambda *args: build(*args, devices=jax.devices()[:count])


def _sleep_after_updates(seconds):
  update = progress.Progress.update

  def hooked(self, step, loss=None):
    update(self, step, loss)
    if loss is None:
      time.sleep(seconds)

  progress.Progress.update = hooked


if __name__ == "__main__":
  devices, seconds = int(sys.argv.pop(1)), float(sys.argv.pop(1))
  if devices:
    _use_devices(devices)
  if seconds:
    _sleep_after_updates(seconds)
  logging.set_verbosity(logging.WARNING)
  app.run(main.main, flags_parser=main.parse_flags)
