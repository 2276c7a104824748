"""Reads arrays recorded from the official code and rebuilds their model; shared by the parity tests."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax import convert
from mplug_jax.models.mplug import MPlug

# MPLUG_GOLDEN names a folder with more recordings; the tests then run on those as well.
FOLDERS = [pathlib.Path(__file__).parent / "golden"] + [pathlib.Path(p) for p in [os.environ.get("MPLUG_GOLDEN")] if p]


def recordings(task):
  """Paths of the recorded files of a task."""
  found = {path.name: path for folder in reversed(FOLDERS) for path in sorted(folder.glob(f"{task}_*.npz"))}
  return list(found.values())


class Recording:
  """One recorded file: `r["out/visual"]`, `r.meta`, and the model and parameters (online, momentum) it came from."""

  def __init__(self, path):
    with np.load(path) as file:
      self.arrays = {name: file[name] for name in file.files}
    self.meta = json.loads(str(self.arrays["meta"]))
    self.state_dict = {name[3:]: x for name, x in self.arrays.items() if name.startswith("sd/")}
    self.geometry = convert.geometry_from_recording(self.meta)
    self.model = MPlug(**self.geometry)
    self.params = self._params(False)

  def _params(self, momentum):
    return jax.tree.map(jnp.asarray, convert.params_from_torch(self.state_dict, self.geometry, momentum))

  @property
  def teacher(self):
    return self._params(True)

  def __getitem__(self, name):
    return self.arrays[name]

  def image(self, name="in/image"):
    """Recorded images are NCHW (videos: B, frames, C, H, W), ours have the channels last."""
    return jnp.moveaxis(jnp.asarray(self[name]), -3, -1)

  def apply(self, params, method, *args):
    return jax.jit(lambda p, *a: self.model.apply({"params": p}, *a, method=method))(params, *args)

  def as_ours(self, prefix):
    """Recorded per-parameter arrays (gradients, values after an update) -> {our path: array}, whole leaves only."""
    names = [n for n in self.arrays if n.startswith(prefix)]
    return {n[len(prefix):]: self.arrays[n] for n in names}


def close(ours, recorded, tolerance=2e-5, name=""):
  """Asserts max |ours - recorded| <= tolerance * max(1, max |recorded|)."""
  ours, recorded = np.asarray(ours), np.asarray(recorded)
  assert ours.shape == recorded.shape, (name, ours.shape, recorded.shape)
  error = np.abs(ours - recorded).max()
  assert error <= tolerance * max(1.0, np.abs(recorded).max()), f"{name}: {error}"


def gradients_close(ours, recorded, name=""):
  """Asserts max |difference| <= 1e-4 * max(max |recorded|, 1e-3), the tolerance of the recordings."""
  error = np.abs(np.asarray(ours) - recorded).max()
  assert error <= 1e-4 * max(np.abs(recorded).max(), 1e-3), f"{name}: {error} of {np.abs(recorded).max()}"
