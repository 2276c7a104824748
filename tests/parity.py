"""Reads arrays recorded from the official code and rebuilds their model; shared by the parity tests."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax import convert, decode, sharding
from mplug_jax.models.mplug import decoding_fns, MPlug

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

  def compare_gradients(self, gradients, prefix, tag):
    """Every recorded gradient array, and the norm of every parameter's gradient, against our tree."""
    ours = {sharding.path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(gradients)}
    converter = convert.Converter(convert.online_names(self.state_dict), self.geometry)

    def of_ours(name, index):
      return ours[name] if index is None else ours[name][index]

    for key in [n for n in self.arrays if n.startswith(prefix)]:
      for name, index, array in converter.pieces(key[len(prefix):], self[key]):
        gradients_close(of_ours(name, index), array, key)
    compared = 0
    for key, norm in self.meta["grad_norms"][tag].items():
      if "_m." in key or key.endswith("_m"):
        assert norm is None
        continue
      targets = converter.pieces(key, self.state_dict[key])
      if norm is None or not targets:
        assert not targets or all(not np.any(of_ours(n, i)) for n, i, _ in targets if n in ours), key
        continue
      square = sum(np.square(of_ours(n, i).astype(np.float64)).sum() for n, i, _ in targets)
      assert abs(np.sqrt(square) - norm) <= 2e-4 * norm + 1e-6, (key, np.sqrt(square), norm)
      compared += 1
    assert compared > 20

  def compare_values(self, params, prefix, tolerance):
    """Recorded values of parameters after updates against ours."""
    ours = {sharding.path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(params)}
    converter = convert.Converter(convert.online_names(self.state_dict), self.geometry)
    for key in [n for n in self.arrays if n.startswith(prefix)]:
      online = convert.online_names([key[len(prefix):]], "_m." in key)
      for name, index, array in converter.pieces(next(iter(online)), self[key]):
        got = ours[name] if index is None else ours[name][index]
        assert np.abs(got - array).max() <= tolerance, (key, np.abs(got - array).max())


def encode(m, image, ids, mask):
  """Everything recorded of the encoders and of the fusion, under its recorded name."""
  visual = m.visual_encoder(image)
  image = m.encode_image(image)
  text = m.encode_text(ids, mask)
  return {"visual": visual, "image_embeds": image, "text_embeds": text,
          **dict(zip(("fusion_image", "fusion_text"), m.fuse(text, mask, image)))}


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


def check_beams(recording, memory, prompt):
  """Every recorded beam search in reference mode: ids, lengths exactly, scores to 5e-5."""
  r = recording
  rows = memory.rows
  for name in [n.split("/")[1] for n in r.arrays if n.startswith("beam/") and n.endswith("/ids")]:
    beams, least, most = (int(part.lstrip("beaminx")) for part in name.split("_"))

    @jax.jit
    def search(params, beams=beams, least=least, most=most):
      apply = lambda method, *args: r.model.apply({"params": params}, *args, method=method)  # noqa: E731
      cache = apply(MPlug.init_cache, memory, beams, prompt.shape[1] + most)
      step, reorder = decoding_fns(r.model, params)
      return decode.beam_search(step, reorder, cache, prompt, jnp.full((rows,), prompt.shape[1]), beams=beams, max_length=most,
                                min_length=least, eos_id=102, pad_id=-1, mode="reference")

    ours = search(r.params)
    recorded = r[f"beam/{name}/ids"]
    scores = r[f"beam/{name}/scores"]
    assert np.abs(np.asarray(ours.scores) - scores).max() <= 5e-5, name
    if r.meta["beam"][name]["min_score_gap_between_hyps"] > 1e-5:
      np.testing.assert_array_equal(ours.tokens[:, :, :recorded.shape[2]], recorded, err_msg=name)
      np.testing.assert_array_equal(ours.lengths, r[f"beam/{name}/lengths"], err_msg=name)
