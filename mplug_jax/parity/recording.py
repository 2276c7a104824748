"""One recorded file: its arrays, the model and the parameters they came from, and comparisons with them.

A recording is an .npz file of arrays that the official PyTorch code wrote, without dropout, in
float32: `meta` (JSON: task, geometry, settings), `sd/<name>` the state dict, `in/...` inputs, and
results: `out/...`, `grad/<loss>/<parameter>`, `beam/...`, `momentum_after/...`, `queue_after/...`,
`opt/...`.
"""

import functools
import json
import pathlib
import re
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.conversion import mapping
from mplug_jax.conversion.formats import mplug
from mplug_jax.models.mplug import MPlug
from mplug_jax.parallel import rules
from mplug_jax.parity.rows import GRADIENT, NORM, Tolerance, compare


class Unusable(ValueError):
  """The file cannot be checked at all; the message is one sentence that says why."""


# Arrays that only files of one task hold, for a file whose `meta` does not name its task.
_SIGNS = {
  "in/answer_ids": "vqa",
  "in/video": "videocap",
  "in/boxes": "grounding",
  "in/caption_ids": "caption",
  "in/step1/image": "retrieval",
  "in/eval/image": "retrieval",
}


def _read(path):
  """Path -> {name: array}, or Unusable."""
  try:
    with np.load(path) as file:
      return {name: file[name] for name in file.files}
  except FileNotFoundError as e:
    raise Unusable(f"{path} does not exist.") from e
  except (AttributeError, TypeError) as e:  # np.load reads .npy files too, and gives an array
    raise Unusable(f"{path} holds a single array, not an .npz archive of recorded arrays.") from e
  except (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
  ) as e:
    reason = (str(e) or type(e).__name__).splitlines()[0]
    raise Unusable(
      f"{path} cannot be read as an .npz archive, it is of another kind or damaged ({reason})."
    ) from e


def _meta(path, arrays):
  """The JSON object in `meta`, or Unusable."""
  if "meta" not in arrays:
    raise Unusable(f"{path} has no array 'meta', which says what was recorded.")
  try:
    meta = json.loads(str(arrays["meta"]))
  except json.JSONDecodeError as e:
    raise Unusable(f"{path}: 'meta' is not JSON ({e}).") from e
  missing = [key for key in ("geometry", "bert_config", "config", "ids") if key not in meta]
  if missing:
    raise Unusable(f"{path}: 'meta' lacks {', '.join(missing)}, so the model cannot be built.")
  return meta


def _task(path, meta, arrays):
  """The task by `meta`, else by arrays that only one task has, else by the file's name."""
  by_arrays = [task for sign, task in _SIGNS.items() if sign in arrays]
  return meta.get("task") or next(iter(by_arrays), pathlib.Path(path).name.split("_")[0])


class Recording:
  """`r["out/visual"]`, `r.meta`, `r.task`, `r.model`, `r.params`.

  Every comparison is noted, so that the rest can be listed.

  skipped: {name: why} of arrays that were not compared on purpose. unchecked: recorded results no
    comparison has read.

  Raises:
    Unusable: no such file, not an .npz archive, damaged, or without a usable `meta` or state dict.
  """

  def __init__(self, path):
    self.path = str(path)
    self.arrays = _read(path)
    self.meta = _meta(path, self.arrays)
    self.task = _task(path, self.meta, self.arrays)
    self.state_dict = {name[3:]: x for name, x in self.arrays.items() if name.startswith("sd/")}
    if not self.state_dict:
      raise Unusable(f"{path} holds no weights: no array is named 'sd/...'.")
    try:
      self.geometry = mplug.geometry_from_recording(self.meta)
    except KeyError as e:
      raise Unusable(f"{path}: 'meta' lacks {e.args[0]}, so the model cannot be built.") from e
    self.model = MPlug(**self.geometry)
    self.pad, self.bos, self.eos = (int(self.meta["ids"][name]) for name in ("pad", "cls", "sep"))
    self.skipped, self._compared = {}, set()

  @functools.cached_property
  def params(self):
    """The online weights as parameters of `model`.

    Raises ValueError when the conversion table finds a mistake.
    """
    return jax.tree.map(jnp.asarray, mapping.params_from_torch(self.state_dict, self.geometry))

  @functools.cached_property
  def teacher(self):
    """The momentum copies of the weights, numpy: a tree like `params`, of the modules that have one."""
    return mapping.params_from_torch(self.state_dict, self.geometry, momentum=True)

  @functools.cached_property
  def _converter(self):
    return mapping.Converter(mapping.online_names(self.state_dict), self.geometry)

  def __getitem__(self, name):
    if name not in self.arrays:
      raise LookupError(f"the file has no array {name!r}")
    return self.arrays[name]

  def names(self, prefix):
    """Names of arrays that begin with `prefix`."""
    return [name for name in self.arrays if name.startswith(prefix)]

  @property
  def unchecked(self):
    results = (n for n in self.arrays if n != "meta" and not n.startswith(("sd/", "in/")))
    return [n for n in results if n not in self._compared and n not in self.skipped]

  def image(self, name="in/image"):
    """f32[..., C, H, W] as recorded -> f32[..., H, W, C]."""
    return jnp.moveaxis(jnp.asarray(self[name]), -3, -1)

  def text(self, name):
    """i32[R, T] and bool[R, T] (True = token): "in/question" reads in/question_ids and in/question_mask."""
    return jnp.asarray(self[f"{name}_ids"], jnp.int32), jnp.asarray(self[f"{name}_mask"]) > 0

  def skip(self, name, why):
    self.skipped[name] = why

  def lacks(self, *names):
    """True if none of the arrays is in the file; then they are noted as skipped."""
    missing = [name for name in names if name not in self.arrays]
    for name in missing if len(missing) == len(names) else ():
      self.skip(name, "not in the file")
    return len(missing) == len(names)

  def compare(self, outputs, tolerance, prefix="out/"):
    """{name after `prefix`: our array} -> Rows; names that the file lacks are noted as skipped."""
    for name, ours in outputs.items():
      if not self.lacks(prefix + name):
        self._compared.add(prefix + name)
        yield compare(prefix + name, ours, self[prefix + name], tolerance)

  def compare_part(self, name, part, ours, recorded, tolerance):
    """A Row for a part, or another view, of the recorded array `name`."""
    self._compared.add(name)
    return compare(f"{name}{part}", ours, recorded, tolerance)

  def pairs(self, tree, prefix):
    """Every recorded `<prefix><PyTorch parameter>` with its place in a tree like `params`: (name, ours f32[n], recorded f32[n])."""
    flat = _by_path(tree)
    for key in self.names(prefix):
      torch_name = key[len(prefix) :]
      momentum = re.match(r"\w+_m(\.|$)", torch_name) is not None
      pieces = self._converter.pieces(*mapping.online_names([torch_name], momentum), self[key])
      if not pieces:
        self.skip(key, "this tensor never runs, the model has none")
        continue
      self._compared.add(key)
      both = zip(*((_leaf(flat, name, index), array) for name, index, array in pieces))
      yield key, *(np.concatenate([np.ravel(x) for x in side]) for side in both)

  def compare_tree(self, tree, prefix, tolerance):
    """`pairs` -> Rows."""
    for key, ours, recorded in self.pairs(tree, prefix):
      yield compare(key, ours, recorded, tolerance)._replace(shape=self[key].shape)

  def compare_gradients(self, gradients, tag):
    """Recorded gradient arrays of the loss `tag`, and the norm of every parameter's gradient -> Rows.

    Norms come as one Row for each module, with the numbers of its worst tensor.
    """
    yield from self.compare_tree(gradients, f"grad/{tag}/", GRADIENT)
    norms = self.meta.get("grad_norms", {}).get(tag)
    if not norms:
      self.skip(f"meta.grad_norms.{tag}", "not in the file")
      return
    flat, modules = _by_path(gradients), {}
    # A key's bias moves all scores of a query alike: its gradient is rounding, as large as the
    # others make it.
    rounding = Tolerance(
      max(NORM.absolute, 1e-8 * max(norm or 0.0 for norm in norms.values())), NORM.relative
    )
    for key, norm in norms.items():
      if norm is not None or not re.match(
        r"\w+_m(\.|$)", key
      ):  # a momentum copy has no gradient, on either side
        modules.setdefault(key.split(".")[0], []).append(self._norm(flat, key, norm, rounding))
    for module, rows in modules.items():
      worst = max(rows, key=lambda row: row.error / row.tolerance)
      yield worst._replace(
        name=f"grad_norms/{tag}/{module}",
        shape=(len(rows),),
        passed=all(row.passed for row in rows),
        note=worst.name,
      )

  def _norm(self, flat, key, norm, tolerance):
    """Norm of one parameter's gradient, PyTorch's name and layout (None: no gradient) -> Row."""
    pieces = [
      piece
      for online in mapping.online_names([key])
      for piece in self._converter.pieces(online, self.state_dict[key])
    ]
    parts = [
      _leaf(flat, name, index) for name, index, _ in pieces if norm is not None or name in flat
    ]
    ours = np.sqrt(sum(np.square(part.astype(np.float64)).sum() for part in parts))
    return compare(key, ours, norm or 0.0, tolerance)


def _by_path(tree):
  """Tree -> {path: numpy array}."""
  return {rules.path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def _leaf(flat, name, index):
  """A parameter by its path, or one layer's part of a stacked one."""
  return flat[name] if index is None else flat[name][index]


def encode(m, image, ids, mask):
  """Everything recorded of the encoders and the fusion encoder, by its recorded name.

  `m` is a bound MPlug.
  """
  visual, image = m.visual_encoder(image), m.encode_image(image)
  text = m.encode_text(ids, mask)
  fused = m.fuse(text, mask, image)
  return {
    "visual": visual,
    "image_embeds": image,
    "text_embeds": text,
    "fusion_image": fused[0],
    "fusion_text": fused[1],
  }
