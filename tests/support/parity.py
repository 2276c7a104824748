"""Recordings of the official code for the tests.

What is done with them is mplug_jax/parity.
"""

import os
import pathlib

import numpy as np
import pytest

from mplug_jax.parity import verify
from mplug_jax.parity.recording import Recording
from tests.support import paths

__all__ = ["FOLDERS", "Recording", "check", "recordings"]

# MPLUG_GOLDEN names a folder with more recordings; the tests then run on those as well.
FOLDERS = [paths.GOLDEN] + [pathlib.Path(p) for p in [os.environ.get("MPLUG_GOLDEN")] if p]

# Every search is a program of its own. The gate runs each number of beams and each limit of length
# once; slow tests run all searches.
SEARCHES = {
  "caption": ("beam1_min1_max8", "beam3_min1_max10", "beam5_min8_max25"),
  "videocap": ("beam1_min1_max8", "beam3_min10_max30", "beam5_min1_max8", "beam10_min15_max25"),
  "vqa": ("beam1_min1_max8", "beam5_min1_max10", "beam3_min4_max6"),
}


def recordings(*tasks):
  """Decorator: the test runs once for each recorded file `path` of the tasks.

  Of the two geometries beside the tests the first is slow; of the second the searches of the gate
  are a case of their own, `searches`, which is None for all.
  """
  found = {
    path.name: (task, path)
    for folder in reversed(FOLDERS)
    for task in tasks
    for path in sorted(folder.glob(f"{task}_*.npz"))
  }
  cases = []
  for task, path in found.values():
    ours = path.parent == FOLDERS[0]
    if ours and path.stem.endswith("_G5") and task in SEARCHES:
      cases.append(pytest.param(path, SEARCHES[task], id=f"{path.stem}-gate"))
    slow = ours and (path.stem.endswith("_G1") or task in SEARCHES)
    marks = [pytest.mark.slow] if slow else []
    cases.append(pytest.param(path, None, id=path.stem, marks=marks))
  return pytest.mark.parametrize(("path", "searches"), cases)


def check(path, searches, folder, least):
  """Every row of the file passes, there are at least `least`, and every result is checked.

  Args:
    path: recorded file.
    searches: names of the beam searches to run, or None for all.
    folder: where the file without other searches is written.
    least: number of rows.
  """
  if searches:
    kept = tuple(f"beam/{name}/" for name in searches)
    with np.load(path) as file:
      arrays = {n: file[n] for n in file.files if not n.startswith("beam/") or n.startswith(kept)}
    path = folder / path.name
    np.savez(path, **arrays)
  report = verify(path)
  assert not report.failed, "\n".join(map(str, report.failed))
  assert len(report.rows) >= least, len(report.rows)
  assert not report.unchecked
  for name in searches or ():
    assert any(row.name.startswith(f"beam/{name}/") for row in report.rows), name
  return report
