"""Whole checkpoints across the border: PyTorch files -> ours, ours -> PyTorch files, and the manifest of what became of each tensor.

A converted checkpoint is a folder: state/ (Orbax: params, ema_params from momentum copies, extra with the queues), model.json
(fields of MPlug), manifest.json, and dead_weights.safetensors on request.
"""

import collections
import json
import os
import pathlib
import shutil

from flax import traverse_util
import numpy as np
import orbax.checkpoint as ocp

from mplug_jax import checkpoint, convert, files, torch_files, torch_inventory, torch_write
from mplug_jax.convert_names import infer_geometry, official_names
from mplug_jax.models.presets import PRESETS
from mplug_jax.position_resize import LEAF as POSITIONS, resize_positions

_POSITIONS_KEY = "visual_encoder.visual.positional_embedding"


class _Renamed:
  """The tensors of a file under their official names, read when asked for."""

  def __init__(self, file, names):
    self._file, self._names = file, names

  def __iter__(self):
    return iter(self._names)

  def shape(self, name):
    return tuple(self._file.shape(self._names[name]))

  def __getitem__(self, name):
    return self._file[self._names[name]]


def _online_shapes(source):
  return {name: source.shape(key) for name, key in convert.online_names(source).items()}


def _resized(params, image_size, geometry, zero):
  """Parameters with the position table of `image_size` pixels; `zero`: all zeros, as the official start from CLIP (item 1)."""
  leaves = traverse_util.flatten_dict(params, sep="/")
  if POSITIONS in leaves:
    table = leaves[POSITIONS]
    resized = resize_positions(table, 1 + (image_size // geometry["patch_size"]) ** 2).astype(table.dtype)
    leaves[POSITIONS] = np.zeros_like(resized) if zero else resized
  return traverse_util.unflatten_dict(leaves, sep="/")


def _describe(source, file, names, geometry):
  """Manifest rows, one per tensor of the file: name there, official name, shape, dtype, what became of it."""
  rows = []
  for momentum in (False, True):
    keys = convert.online_names(source, momentum)
    converter = convert.Converter(keys, geometry)
    for online, name in keys.items():
      entry = converter.entry(online)
      to = [("ema_params/" if momentum else "params/") + path for path in entry.target] if entry.action == "map" else []
      rows.append({"key": names[name], "name": name, "shape": list(source.shape(name)), "dtype": str(file.dtype(names[name])),
                   "action": entry.action, "to": to, "index": entry.index, "why": "" if to else entry.target})
  return rows


def convert_checkpoint(path, dest, *, image_size=0, dtype=None, zero_positions=False, keep_dead=False, **given):
  """PyTorch checkpoint -> folder that `init_from`, `export_torch` and `checkpoint.load_params` read.

  Args:
    path: file or folder, see `torch_files.open_tensors`.
    dest: new folder.
    image_size: pixels to resize the position tables to; 0 keeps them.
    dtype: of the result, for example "float32"; None keeps each tensor's.
    zero_positions: position tables of zeros, as the official code starts from CLIP (docs/official.md item 1).
    keep_dead: also keep the tensors that never run, for a later export.
    given: fields of MPlug that the shapes do not tell, see `convert_names.infer_geometry`.

  Returns:
    The manifest: {"source", "geometry", "tensors": rows}.

  Raises:
    ValueError, FileNotFoundError: the file cannot be used, or does not fit; nothing is written.
    FileExistsError: `dest` exists.
  """
  dest = pathlib.Path(dest)
  if dest.exists():
    raise FileExistsError(f"{dest} exists already; choose another destination or remove it.")
  with torch_files.open_tensors(path) as file:
    names = official_names(file.keys())
    source = _Renamed(file, names)
    geometry = infer_geometry(_online_shapes(source), **given)
    new_geometry = geometry | ({"image_size": image_size} if image_size else {})
    trees = {}
    for which, momentum in (("params", False), ("ema_params", True)):
      if convert.online_names(source, momentum):
        params = convert.params_from_torch(source, geometry, momentum, dtype)
        trees[which] = _resized(params, new_geometry["image_size"], geometry, zero_positions)
    rows = _describe(source, file, names, geometry)
    if queues := {row["name"]: file[row["key"]] for row in rows if row["action"] == "queue"}:
      trees["extra"] = queues
    manifest = {"source": str(path), "geometry": new_geometry, "placeholders": dict(file.placeholders), "tensors": rows}
    dead = [torch_write.Tensor(row["name"], row["shape"], row["dtype"], lambda key=row["key"]: file[key])
            for row in rows if row["action"] == "dead"]
    _write_folder(dest, trees, manifest, dead if keep_dead else [])
  return manifest


def _write_folder(dest, trees, manifest, dead):
  """Everything or nothing: the folder gets its name when it is complete."""
  dest.parent.mkdir(parents=True, exist_ok=True)
  partial = dest.with_name(f"{dest.name}.partial{os.getpid()}")
  try:
    partial.mkdir()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      checkpointer.save((partial / "state").absolute(), args=ocp.args.PyTreeSave(trees))
    files.write_json(partial / "model.json", manifest["geometry"])
    files.write_json(partial / "manifest.json", manifest)
    if dead:
      torch_write.save_safetensors(partial / "dead_weights.safetensors", dead)
    partial.rename(dest)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


# ---- the way back


class _Exported:
  """A checkpoint of ours as PyTorch tensors: what each one is, and its value when it is asked for."""

  def __init__(self, path, task, dtype):
    path = pathlib.Path(path)
    self.trees = {which: checkpoint.load_arrays(path, which) for which in ("params", "ema_params", "extra")}
    if not self.trees["params"]:
      raise ValueError(f"{path} holds no parameters.")
    self.geometry, rows, run_task = _what_it_is(path, self.trees["params"])
    self.task, self._dtype = task or run_task, dtype
    self.tensors = self._tensors(task, rows)
    self._converters = {m: convert.Converter(convert.online_names(self.tensors, m), self.geometry) for m in (False, True)}
    dead = path / "dead_weights.safetensors"
    self._dead = torch_files.open_tensors(dead) if dead.exists() else {}
    self._rng = np.random.default_rng(0)

  def _tensors(self, task, rows):
    """{PyTorch name: Tensor}: of the source when this was converted from one, else of the official model of the task."""
    if not rows or task:
      return torch_inventory.inventory(self.task, self.geometry, stored_fusion_layers=max(12, self.geometry["fusion_layers"]))
    tensors = {row["name"]: torch_inventory.Tensor(tuple(row["shape"]), row["dtype"]) for row in rows}
    for name in (_POSITIONS_KEY, _momentum_name(_POSITIONS_KEY)):
      if name in tensors:
        tensors[name] = tensors[name]._replace(shape=self.trees["params"][POSITIONS].shape)
    return tensors

  def describe(self, name):
    """-> (action, text for the manifest, function () -> array). Action "tied": the text is the name of the other tensor."""
    tensor, momentum = self.tensors[name], name in convert.online_names([name], momentum=True).values()
    online = next(iter(convert.online_names([name], momentum)))
    entry = self._converters[momentum].entry(online)
    if entry.action == "map":
      tree, why = "ema_params" if momentum else "params", ""
      if momentum and not all(path in self.trees[tree] for path in entry.target):
        tree, why = "params", "copied from the online weights: the checkpoint has no average"
      if missing := [path for path in entry.target if path not in self.trees[tree]]:
        raise ValueError(f"{name} of the official {self.task} model needs {missing[0]}, which the checkpoint does not have; "
                         "give the task that it was trained for, with --task.")
      return ("made" if why else "map"), why, lambda: convert.tensor_to_torch(entry, self.trees[tree].__getitem__, tensor.shape)
    if entry.action == "tied":
      return "tied", _momentum_name(entry.target) if momentum else entry.target, None
    if entry.action == "constant":
      return "made", entry.target, lambda: torch_inventory.constant(name, tensor)
    if entry.action == "queue" and entry.target in self.trees["extra"]:
      return "map", "", lambda: self.trees["extra"][entry.target]
    if name in self._dead:
      return "dead", "kept from the source: " + entry.target, lambda: self._dead[name]
    return "dead", "by the official initialisation: " + entry.target, lambda: torch_inventory.initial(name, tensor, self._rng)

  def dtype(self, name):
    """numpy dtype in the file; whole numbers stay what they are."""
    own = self.tensors[name].dtype
    return own if self._dtype is None or own.startswith(("int", "bool")) else self._dtype


def _momentum_name(name):
  head, dot, rest = name.partition(".")
  return f"{head}_m{dot}{rest}"


def _what_it_is(path, params):
  """A converted folder or a run -> (fields of MPlug, manifest rows or [], task)."""
  if (path / "model.json").exists():
    geometry = json.loads((path / "model.json").read_text())
    return geometry, json.loads((path / "manifest.json").read_text())["tensors"], ""
  if not (path / "config.json").exists():
    raise ValueError(f"{path} is neither a converted checkpoint (model.json) nor a run folder (config.json).")
  config = json.loads((path / "config.json").read_text())
  geometry = {name: config["model"][name] for name in ("embed_dim", "fusion", "vision_heads", *PRESETS["base"])}
  words = next(x for path, x in params.items() if path.endswith("embeddings/word/embedding"))
  return geometry | {"vocab_size": len(words), "pad_id": 0}, [], config["task"]["name"]


def export_torch(path, dest, *, task="", slim=False, dtype=None):
  """A checkpoint of ours -> .pth (or .safetensors) with the official names, shapes and dtypes.

  Args:
    path: converted folder, or run folder.
    dest: file; its ending decides the format.
    task: official model whose tensors are written; "" for the source's own, or the run's task.
    slim: leave out the tensors that never run.
    dtype: of floating-point tensors; None: the source's.

  Returns:
    The manifest: {"source", "task", "tensors": rows}.

  Raises:
    ValueError, FileNotFoundError: the checkpoint cannot be used; nothing is written.
  """
  source, rows, out = _Exported(path, task, dtype), [], []
  for name, tensor in source.tensors.items():
    action, why, value = source.describe(name)
    if slim and action == "dead":
      continue
    dtype = source.dtype(name)
    rows.append({"name": name, "shape": list(tensor.shape), "dtype": dtype, "action": action, "why": why})
    if action == "tied":
      out.append(torch_write.Tensor(name, tensor.shape, dtype, same_as=why))
    else:
      out.append(torch_write.Tensor(name, tensor.shape, dtype, lambda value=value, dtype=dtype: value().astype(dtype)))
  save = torch_write.save_safetensors if str(dest).endswith(".safetensors") else torch_write.save_pth
  save(dest, out)
  return {"source": str(path), "task": source.task, "tensors": rows}


def summary(manifest):
  """Manifest -> lines of text: how many tensors and numbers were mapped, dropped (why) or made."""
  counts, sizes = collections.Counter(), collections.Counter()
  for row in manifest["tensors"]:
    what = "mapped" if row["action"] == "map" else f"{row['action']}: {row['why']}"
    counts[what] += 1
    sizes[what] += int(np.prod(row["shape"]))
  return [f"{counts[what]:6d} tensors {sizes[what] / 1e6:9.2f} million  {what}" for what in sorted(counts)]
