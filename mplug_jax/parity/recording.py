"""Recorded files of results of the official code, and comparisons with them.

A recording is an .npz file of arrays that the official PyTorch code wrote, without dropout, in
float32: `meta` (JSON: task, geometry, settings), `sd/<name>` the state dict, `in/...` inputs, and
results: `out/...`, `grad/<loss>/<parameter>`, `beam/...`, `momentum_after/...`, `queue_after/...`,
`opt/...`.
"""

import functools
import json
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mplug_jax.conversion import mapping
from mplug_jax.conversion.formats import mplug
from mplug_jax.models.mplug import MPlug
from mplug_jax.parallel import rules
from mplug_jax.parity.rows import GRADIENT, NORM, Row, Tolerance, compare


class Unusable(ValueError):
  """The file cannot be checked; the message is one sentence that says why."""


# Arrays that only files of one task have, for a file whose `meta` does not name its task.
_SIGNS = {
  "in/answer_ids": "vqa",
  "in/video": "videocap",
  "in/boxes": "grounding",
  "in/caption_ids": "caption",
  "in/step1/image": "retrieval",
  "in/eval/image": "retrieval",
}


def _read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Reads the arrays by name; raises Unusable."""
  try:
    with np.load(path) as file:
      return {name: file[name] for name in file.files}
  except FileNotFoundError as e:
    raise Unusable(f"{path} does not exist.") from e
  except (AttributeError, TypeError) as e:  # np.load also reads .npy files, as one array.
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


def _meta(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Returns the JSON object in `meta`; raises Unusable."""
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


def _task(
  path: str | os.PathLike[str], meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> str:
  """Returns the task by `meta`, else by arrays that only one task has, else by the file's name."""
  by_arrays = [task for sign, task in _SIGNS.items() if sign in arrays]
  return meta.get("task") or next(iter(by_arrays), pathlib.Path(path).name.split("_")[0])


def _is_momentum(torch_name: str) -> bool:
  """Returns whether a PyTorch parameter is a momentum copy."""
  return re.match(r"\w+_m(\.|$)", torch_name) is not None


class Recording:
  """A recorded file: `r["out/visual"]` is an array.

  It keeps account of comparisons, so that the remaining arrays can be listed.

  Attributes:
    path: path of the file.
    arrays: {name: array}.
    meta: task, geometry and settings.
    task: task of the file.
    state_dict: {PyTorch name: array} of the weights.
    geometry: fields of the model.
    model: model without parameters.
    pad: id of the padding token.
    bos: id of the first token.
    eos: id of the last token.
    skipped: {name: reason} of arrays that are not compared on purpose.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Reads the file.

    Args:
      path: .npz file.

    Raises:
      Unusable: the file does not exist, is damaged or no .npz archive, or has no usable `meta` or
        state dict.
    """
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
    self.skipped: dict[str, str] = {}
    self._compared: set[str] = set()

  @functools.cached_property
  def params(self) -> Any:
    """The online weights as parameters of `model`."""
    return jax.tree.map(jnp.asarray, mapping.params_from_torch(self.state_dict, self.geometry))

  @functools.cached_property
  def teacher(self) -> Any:
    """The momentum copies of the weights, NumPy arrays, of the modules that have them."""
    return mapping.params_from_torch(self.state_dict, self.geometry, momentum=True)

  @functools.cached_property
  def _converter(self) -> mapping.Converter:
    return mapping.Converter(mapping.online_names(self.state_dict), self.geometry)

  def __getitem__(self, name: str) -> np.ndarray:
    if name not in self.arrays:
      raise LookupError(f"the file has no array {name!r}")
    return self.arrays[name]

  def names(self, prefix: str) -> list[str]:
    """Returns the names of arrays that begin with a prefix.

    Args:
      prefix: such as "out/".
    """
    return [name for name in self.arrays if name.startswith(prefix)]

  @property
  def unchecked(self) -> list[str]:
    """Recorded results that no comparison has read."""
    results = (n for n in self.arrays if n != "meta" and not n.startswith(("sd/", "in/")))
    return [n for n in results if n not in self._compared and n not in self.skipped]

  def image(self, name: str = "in/image") -> Float[Array, "*batch height width channels"]:
    """Returns images f32[..., H, W, C], which are recorded as f32[..., C, H, W].

    Args:
      name: name of the array.
    """
    return jnp.moveaxis(jnp.asarray(self[name]), -3, -1)

  def text(self, name: str) -> tuple[Int[Array, "rows length"], Bool[Array, "rows length"]]:
    """Returns token ids i32[R, T] and their mask bool[R, T], True for tokens.

    Args:
      name: such as "in/question" for in/question_ids and in/question_mask.
    """
    return jnp.asarray(self[f"{name}_ids"], jnp.int32), jnp.asarray(self[f"{name}_mask"]) > 0

  def skip(self, name: str, why: str) -> None:
    """Marks an array as not compared on purpose.

    Args:
      name: name of the array.
      why: reason.
    """
    self.skipped[name] = why

  def lacks(self, *names: str) -> bool:
    """Returns whether none of the arrays is in the file, and then marks them as skipped.

    Args:
      *names: names of arrays.
    """
    if any(name in self.arrays for name in names):
      return False
    for name in names:
      self.skip(name, "not in the file")
    return True

  def compare(
    self, outputs: Mapping[str, Any], tolerance: Tolerance, prefix: str = "out/"
  ) -> Iterator[Row]:
    """Compares arrays; those that the file lacks are marked as skipped.

    Args:
      outputs: {name after `prefix`: our array}.
      tolerance: accepted error.
      prefix: prefix of the names.

    Yields:
      A row for each array.
    """
    for name, ours in outputs.items():
      if not self.lacks(prefix + name):
        self._compared.add(prefix + name)
        yield compare(prefix + name, ours, self[prefix + name], tolerance)

  def compare_part(
    self, name: str, part: str, ours: Any, recorded: Any, tolerance: Tolerance
  ) -> Row:
    """Compares a part, or another view, of a recorded array.

    Args:
      name: name of the array.
      part: name of the part, for the row.
      ours: our array.
      recorded: part of the recorded array.
      tolerance: accepted error.
    """
    self._compared.add(name)
    return compare(f"{name}{part}", ours, recorded, tolerance)

  def pairs(
    self, tree: Any, prefix: str
  ) -> Iterator[tuple[str, Float[np.ndarray, " n"], Float[np.ndarray, " n"]]]:
    """Pairs recorded PyTorch parameters with the leaves of a tree like `params`.

    Args:
      tree: tree like `params`.
      prefix: prefix of the recorded names.

    Yields:
      Name, ours and recorded, both flat.
    """
    flat = _by_path(tree)
    for key in self.names(prefix):
      torch_name = key[len(prefix) :]
      (online_name,) = mapping.online_names([torch_name], _is_momentum(torch_name))
      pieces = self._converter.pieces(online_name, self[key])
      if not pieces:
        self.skip(key, "this tensor never runs, the model has none")
        continue
      self._compared.add(key)
      ours = np.concatenate([np.ravel(_leaf(flat, name, index)) for name, index, _ in pieces])
      yield key, ours, np.concatenate([np.ravel(array) for _, _, array in pieces])

  def compare_tree(self, tree: Any, prefix: str, tolerance: Tolerance) -> Iterator[Row]:
    """Compares recorded PyTorch parameters with the leaves of a tree like `params`.

    Args:
      tree: tree like `params`.
      prefix: prefix of the recorded names.
      tolerance: accepted error.

    Yields:
      A row for each recorded parameter.
    """
    for key, ours, recorded in self.pairs(tree, prefix):
      yield compare(key, ours, recorded, tolerance)._replace(shape=self[key].shape)

  def compare_gradients(self, gradients: Any, tag: str) -> Iterator[Row]:
    """Compares the recorded gradients of a loss, and the norms of all gradients.

    Args:
      gradients: tree like `params`.
      tag: name of the loss.

    Yields:
      A row for each recorded gradient, and one for the norms of each module, with the numbers of
      its worst tensor.
    """
    yield from self.compare_tree(gradients, f"grad/{tag}/", GRADIENT)
    norms = self.meta.get("grad_norms", {}).get(tag)
    if not norms:
      self.skip(f"meta.grad_norms.{tag}", "not in the file")
      return
    flat = _by_path(gradients)
    modules: dict[str, list[Row]] = {}
    # The bias of the keys shifts all scores of a query equally: its gradient is the rounding error
    # of the other gradients.
    rounding = Tolerance(
      max(NORM.absolute, 1e-8 * max(norm or 0.0 for norm in norms.values())), NORM.relative
    )
    for key, norm in norms.items():
      if norm is None and _is_momentum(key):
        continue  # A momentum copy has no gradient, on either side.
      modules.setdefault(key.split(".")[0], []).append(self._norm(flat, key, norm, rounding))
    for module, rows in modules.items():
      worst = max(rows, key=lambda row: row.error / row.tolerance)
      yield worst._replace(
        name=f"grad_norms/{tag}/{module}",
        shape=(len(rows),),
        passed=all(row.passed for row in rows),
        note=worst.name,
      )

  def _norm(
    self, flat: Mapping[str, np.ndarray], key: str, norm: float | None, tolerance: Tolerance
  ) -> Row:
    """Compares the norm of a gradient by its PyTorch name; None means that it has no gradient."""
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


def _by_path(tree: Any) -> dict[str, np.ndarray]:
  """Returns {path: array} of a tree."""
  return {rules.path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def _leaf(flat: Mapping[str, np.ndarray], name: str, index: int | None) -> np.ndarray:
  """Returns a parameter by its path, or the part of one layer of a stacked one."""
  return flat[name] if index is None else flat[name][index]


def encode(
  m: MPlug,
  image: Float[Array, "batch size size 3"],
  ids: Int[Array, "batch length"],
  mask: Bool[Array, "batch length"],
) -> dict[str, Array]:
  """Runs the encoders and the fusion encoder.

  Args:
    m: bound model.
    image: normalized images f32[B, S, S, 3].
    ids: i32[B, L].
    mask: bool[B, L], True for tokens.

  Returns:
    Outputs by recorded name.
  """
  image_embeds = m.encode_image(image)
  text_embeds = m.encode_text(ids, mask)
  fusion_image, fusion_text = m.fuse(text_embeds, mask, image_embeds)
  return {
    "visual": m.visual_encoder(image),
    "image_embeds": image_embeds,
    "text_embeds": text_embeds,
    "fusion_image": fusion_image,
    "fusion_text": fusion_text,
  }
