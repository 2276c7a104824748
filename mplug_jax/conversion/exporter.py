"""Writes a checkpoint as PyTorch weights under the official names."""

import functools
import json
import os
import pathlib

import numpy as np

from mplug_jax.checkpoints import reading
from mplug_jax.checkpoints.position_embeddings import LEAF as POSITIONS
from mplug_jax.config.resume import upgrade
from mplug_jax.conversion import mapping, official_inventory, storage
from mplug_jax.conversion.geometry import GEOMETRY
from mplug_jax.conversion.manifest import manifest_beside
from mplug_jax.runtime import atomic_files
from mplug_jax.tensor_files import write

# ---- the way back


_OFFICIAL_TASKS = {"scst": "caption"}  # a run's task -> whose official model is the same


class _Exported:
  """A checkpoint of ours as PyTorch tensors: what each one is, and its value when it is asked for."""

  def __init__(self, path, task, dtype, dead):
    self._path, self._dtype, self._dead = path, dtype, dead
    self._shapes = reading.array_shapes(path)
    if not any(name.startswith("params/") for name in self._shapes):
      raise ValueError(f"{path} holds no parameters.")
    self.geometry, rows, run_task = _what_it_is(pathlib.Path(path), self._shapes)
    self.task = task or _OFFICIAL_TASKS.get(run_task, run_task)
    self.tensors = self._tensors({} if task else rows)
    self._converters = {
      m: mapping.Converter(mapping.online_names(self.tensors, m), self.geometry)
      for m in (False, True)
    }
    self._rng = np.random.default_rng(0)
    self._part = functools.lru_cache(maxsize=1)(functools.partial(reading.load_arrays, path))

  def _tensors(self, rows):
    """{PyTorch name: Tensor}: of the source when this was converted from one, else of the official model of the task."""
    if rows:
      return {
        row["name"]: official_inventory.Tensor(tuple(row["shape"]), row["dtype"]) for row in rows
      }
    _, columns = self._shapes.get("extra/image_queue", (0, official_inventory.QUEUE))
    return official_inventory.inventory(
      self.task,
      self.geometry,
      stored_fusion_layers=max(12, self.geometry["fusion_layers"]),
      queue=columns,
    )

  def _leaf(self, path):
    """An array of the checkpoint; its part of the model is in memory until another part is asked for."""
    tree, part, _ = path.split("/", 2)
    return self._part(f"{tree}/{part}")[path.removeprefix(f"{tree}/{part}/")]

  def describe(self, name):
    """-> (action, text for the manifest, shape, function () -> array). Action "tied": the text is the name of the other tensor."""
    tensor, momentum = (
      self.tensors[name],
      name in mapping.online_names([name], momentum=True).values(),
    )
    online = next(iter(mapping.online_names([name], momentum)))
    entry = self._converters[momentum].entry(online)
    if entry.action == "map":
      tree, why = self._tree(name, entry, momentum)
      shape = (
        self._shapes[f"{tree}/{POSITIONS}"] if entry.target == (POSITIONS,) else tensor.shape
      )  # of another resolution now
      leaf = lambda path: self._leaf(f"{tree}/{path}")  # noqa: E731
      return (
        ("made" if why else "map"),
        why,
        shape,
        lambda: mapping.tensor_to_torch(entry, leaf, shape),
      )
    if entry.action == "tied":
      return "tied", _momentum_name(entry.target) if momentum else entry.target, tensor.shape, None
    if entry.action == "constant":
      if name.startswith(
        "vision_model."
      ):  # numbers of the positions, which may have become more or fewer
        tensor = tensor._replace(shape=(1, self._shapes[f"params/{POSITIONS}"][0]))
      return "made", entry.target, tensor.shape, lambda: official_inventory.constant(name, tensor)
    if entry.action == "queue" and f"extra/{entry.target}" in self._shapes:
      return "map", "", tensor.shape, lambda: self._part("extra")[entry.target]
    if name in self._dead:
      return "dead", "kept from the source: " + entry.target, tensor.shape, self._dead[name]
    return (
      "dead",
      "by the official initialisation: " + entry.target,
      tensor.shape,
      lambda: official_inventory.initial(name, tensor, self._rng),
    )

  def _tree(self, name, entry, momentum):
    """-> (tree that has the leaves of the entry, why it is another one than expected or ""). Raises ValueError."""
    if momentum and all(f"ema_params/{path}" in self._shapes for path in entry.target):
      return "ema_params", ""
    if missing := [path for path in entry.target if f"params/{path}" not in self._shapes]:
      raise ValueError(
        f"{name} of the official {self.task} model needs {missing[0]}, which the checkpoint does not have; "
        "give the task that it was trained for, with --task."
      )
    return (
      "params",
      "copied from the online weights: the checkpoint has no average" if momentum else "",
    )

  def dtype(self, name):
    """numpy dtype in the file; whole numbers stay what they are."""
    own = self.tensors[name].dtype
    return own if self._dtype is None or own.startswith(("int", "bool")) else self._dtype


def _momentum_name(name):
  head, dot, rest = name.partition(".")
  return f"{head}_m{dot}{rest}"


def _what_it_is(path, shapes):
  """A converted checkpoint or a run -> (fields of MPlug, manifest rows or [], task)."""
  if description := storage.read_description(path):
    geometry, manifest = description
    return geometry, manifest["tensors"], ""
  if not (path / "config.json").exists():
    raise ValueError(
      f"{path} is neither a converted checkpoint (model.json) nor a run folder (config.json)."
    )
  config = upgrade(json.loads((path / "config.json").read_text()))
  geometry = {name: config["model"][name] for name in GEOMETRY}
  words = next(
    shape
    for name, shape in shapes.items()
    if name.startswith("params/") and name.endswith("embeddings/word/embedding")
  )
  return geometry | {"vocab_size": words[0], "pad_id": 0}, [], config["task"]["name"]


def export_torch(path, dest, *, task="", slim=False, dtype=None):
  """A checkpoint of ours -> .pth (or .safetensors) with the official names, shapes and dtypes, and its manifest beside it.

  One part of the model (an encoder, the decoder) is in memory at a time.

  Args:
    path: converted folder or file, or run folder.
    dest: file; its ending decides the format. Replaced, as the manifest, once the new one is complete.
    task: official model whose tensors are written; "" for the source's own, or the run's task.
    slim: leave out the tensors that never run.
    dtype: of floating-point tensors; None: the source's.

  Returns:
    The manifest: {"source", "task", "tensors": rows}.

  Raises:
    ValueError, FileNotFoundError: the checkpoint cannot be used; nothing is written.
    OSError: the file could not be written; nothing of it remains.
  """
  if os.path.exists(dest) and os.path.samefile(path, dest):
    raise ValueError(f"{dest} is the checkpoint itself; choose another destination.")
  with storage.open_dead(path) as dead:
    source, rows, out = _Exported(path, task, dtype, dead), [], []
    for name in source.tensors:
      action, why, shape, value = source.describe(name)
      if slim and action == "dead":
        continue
      dtype = source.dtype(name)
      rows.append(
        {"name": name, "shape": list(shape), "dtype": dtype, "action": action, "why": why}
      )
      if action == "tied":
        out.append(write.Tensor(name, shape, dtype, same_as=why))
      else:
        out.append(
          write.Tensor(
            name, shape, dtype, lambda value=value, dtype=dtype: value().astype(dtype, copy=False)
          )
        )
    manifest = {"source": str(path), "task": source.task, "tensors": rows}
    _write_export(dest, out, manifest)
  return manifest


def _write_export(dest, tensors, manifest):
  """Both files or neither: the manifest is on disk, under another name, before the tensors are."""
  save = write.save_safetensors if str(dest).endswith(".safetensors") else write.save_pth
  try:
    pathlib.Path(dest).parent.mkdir(parents=True, exist_ok=True)
    with atomic_files.open_atomic(manifest_beside(dest)) as file:
      file.write((json.dumps(manifest, indent=2) + "\n").encode())
      file.flush()
      save(dest, tensors)
  except OSError as error:
    raise storage.not_written(dest, error) from error
