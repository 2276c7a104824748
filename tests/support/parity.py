"""Recordings of the official code for the tests.

What is done with them is mplug_jax/parity.
"""

import os
import pathlib

import pytest

from mplug_jax.parity import verify
from mplug_jax.parity.recording import Recording
from tests.support import paths

__all__ = ["FOLDERS", "Recording", "check", "recordings"]

# MPLUG_GOLDEN names a folder with more recordings; the tests then run on those as well.
FOLDERS = [paths.GOLDEN] + [pathlib.Path(p) for p in [os.environ.get("MPLUG_GOLDEN")] if p]


def recordings(*tasks):
  """Decorator: the test runs once for each recorded file `path` of the tasks.

  Of the two geometries beside the tests the first is slow.
  """
  found = {
    path.name: path
    for folder in reversed(FOLDERS)
    for task in tasks
    for path in sorted(folder.glob(f"{task}_*.npz"))
  }
  slow = {FOLDERS[0] / f"{task}_G1.npz" for task in tasks}
  paths = [
    pytest.param(path, marks=pytest.mark.slow) if path in slow else path for path in found.values()
  ]
  return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def check(path, least):
  """Every row of the file passes, there are at least `least`, and every result is checked."""
  report = verify(path)
  assert not report.failed, "\n".join(map(str, report.failed))
  assert len(report.rows) >= least, len(report.rows)
  assert not report.unchecked
  return report
