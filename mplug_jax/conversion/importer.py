"""Whole checkpoints across the border: PyTorch files -> ours, ours -> PyTorch files, and the manifest of what became of each tensor.

A manifest has a row for each PyTorch tensor. Its "action": "map" (a parameter), "queue" (kept beside the parameters), "dead" (never
run), "tied" (the same as another), "constant" (follows from the model) or "made" (written without a parameter of its own).
"""

import collections
import functools
import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np

from mplug_jax.checkpoints import manager
from mplug_jax.checkpoints.position_embeddings import LEAF as POSITIONS
from mplug_jax.checkpoints.position_embeddings import resize_positions
from mplug_jax.config.presets import PRESETS
from mplug_jax.conversion import mapping, official_inventory, storage
from mplug_jax.conversion.formats.names import config_beside, infer_geometry, official_names
from mplug_jax.runtime import atomic_files
from mplug_jax.tensor_files import open, write


class _Source:
  """The tensors of a file under the names of the conversion tables, read when asked for."""

  def __init__(self, file):
    self._file, self.keys = file, official_names(file.keys())

  def shape(self, name):
    return tuple(self._file.shape(self.keys[name]))

  def dtype(self, name):
    return self._file.dtype(self.keys[name])

  def __getitem__(self, name):
    return self._file[self.keys[name]]


def _check_tied(source, names, entries):
  """Raises ValueError if two names of one tensor have different bytes; both are in memory, and nothing after."""
  for name, entry in entries.items():
    if entry.action == "tied" and entry.target in names:
      pair = names[name], names[entry.target]
      first, second = (np.ascontiguousarray(source[key]).reshape(-1).view(np.uint8) for key in pair)
      if not np.array_equal(first, second):
        raise ValueError(
          f"{pair[0]} and {pair[1]} are one tensor in the official model, but differ in these tensors."
        )


def _leaves(source, names, entries, geometry, dtype):
  """{path of ours: Tensor that is made when it is written}, called by its path; dtype None: what holds its tensors without loss."""
  pieces = collections.defaultdict(
    list
  )  # (name in the source, Entry, place among the entry's leaves), a layer or the whole each
  for name, entry in entries.items():
    for place, path in enumerate(entry.target if entry.action == "map" else ()):
      pieces[path].append((names[name], entry, place))
  shapes, leaves = mapping.leaf_shapes(geometry), {}
  for path, parts in pieces.items():
    own = {source.dtype(name) for name, *_ in parts}
    result = np.dtype(dtype or functools.reduce(jnp.promote_types, own))
    leaves[path] = write.Tensor(
      path, shapes[path], result, functools.partial(_make, source, parts, shapes[path], result)
    )
  return leaves


def _make(source, parts, shape, dtype):
  leaf = np.empty(shape, dtype)
  for name, entry, place in parts:
    index = entry.indices[place]
    _copy(entry.forward(source[name])[place], leaf[... if index is None else index])
  return leaf


def _copy(array, to):
  """to[...] = array; a transposed matrix by 16 columns, a cache line, which takes a fifth of the time."""
  if array.ndim != 2 or not array.flags.f_contiguous:
    to[...] = array
    return
  for i in range(0, array.shape[1], 16):
    to[:, i : i + 16] = array[:, i : i + 16]


def _resize(leaves, tokens, zero):
  """Gives the position table `tokens` rows, or that many of zeros. Returns words for the manifest."""
  table = leaves[POSITIONS]
  shape = (tokens, *table.shape[1:])
  make = (
    (lambda: np.zeros(shape, table.dtype))
    if zero
    else (lambda: resize_positions(table.load(), tokens).astype(table.dtype))
  )
  leaves[POSITIONS] = table._replace(shape=shape, load=make)
  if zero:
    return "replaced by zeros"
  return f"resized from {table.shape[0]} to {tokens} positions" if shape != table.shape else ""


def _tokens(geometry, image_size):
  """Rows of a position table for images of so many pixels. Raises ValueError."""
  patch = geometry["patch_size"]
  if image_size < patch or image_size % patch:
    raise ValueError(
      f"--image_size={image_size} is no multiple of the image encoder's patch size {patch}."
    )
  return 1 + (image_size // patch) ** 2


def _row(source, name, entry, tree, resized):
  """Manifest row of one tensor: key in the file, name in the tables, shape, dtype, action, where it goes, why."""
  to, why = [], entry.target
  if entry.action == "map":
    places = zip(entry.target, entry.indices, strict=True)
    to, why = (
      [f"{tree}/{path}" if i is None else f"{tree}/{path}[{i}]" for path, i in places],
      resized if POSITIONS in entry.target else "",
    )
  elif entry.action == "queue":
    to, why = [f"extra/{name}"], "kept beside the parameters"
  return {
    "key": source.keys[name],
    "name": name,
    "shape": list(source.shape(name)),
    "dtype": str(source.dtype(name)),
    "action": entry.action,
    "to": to,
    "why": why,
  }


def convert_checkpoint(
  path, dest, *, image_size=0, dtype=None, zero_positions=False, keep_dead=False, **given
):
  """PyTorch checkpoint -> one that `init_from`, `export_torch` and `checkpoint.load_params` read (see converted.py).

  One leaf at a time is in memory. Names, shapes and tied copies are checked before anything is written.

  Args:
    path: file or folder, see `torch_files.open_tensors`.
    dest: new folder, or new file with the ending .safetensors.
    image_size: pixels to resize the position tables to; 0 keeps them.
    dtype: of the result, for example "float32"; None keeps each tensor's.
    zero_positions: position tables of zeros, as the official code starts from CLIP (docs/official.md item 1).
    keep_dead: also keep the tensors that never run, for a later export.
    given: fields of MPlug that the shapes do not tell, see `convert_names.infer_geometry`.

  Returns:
    The manifest: {"source", "geometry", "placeholders", "tensors": rows}.

  Raises:
    ValueError, FileNotFoundError: the file cannot be used, or does not fit; nothing is written.
    FileExistsError: `dest` exists.
    OSError: the result could not be written; nothing of it remains.
  """
  if os.path.lexists(dest):
    raise FileExistsError(f"{dest} exists already; choose another destination or remove it.")
  with open.open_tensors(path) as file:
    if "geometry" in file.metadata:
      raise ValueError(
        f"{path} is a converted checkpoint already; tools.export_torch makes PyTorch weights of it."
      )
    source = _Source(file)
    shapes = {name: source.shape(key) for name, key in mapping.online_names(source.keys).items()}
    geometry = infer_geometry(shapes, **config_beside(path) | given)
    tokens = _tokens(geometry, image_size or geometry["image_size"])
    rows, leaves, plans = [], [], []
    for tree, momentum in (("params", False), ("ema_params", True)):
      if names := mapping.online_names(source.keys, momentum):
        plans.append(
          (
            tree,
            names,
            mapping.plan({name: source.shape(key) for name, key in names.items()}, geometry),
          )
        )
    for tree, names, entries in plans:
      _check_tied(source, names, entries)
      found = _leaves(source, names, entries, geometry, dtype)
      resized = _resize(found, tokens, zero_positions) if POSITIONS in found else ""
      leaves += [leaf._replace(name=f"{tree}/{leaf.name}") for leaf in found.values()]
      rows += [_row(source, names[name], entry, tree, resized) for name, entry in entries.items()]
    as_it_is = {
      row["name"]: write.Tensor(
        row["name"], row["shape"], row["dtype"], functools.partial(source.__getitem__, row["name"])
      )
      for row in rows
      if row["action"] in ("queue", "dead")
    }
    leaves += [
      as_it_is[row["name"]]._replace(name=row["to"][0]) for row in rows if row["action"] == "queue"
    ]
    manifest = {
      "source": str(path),
      "geometry": geometry | ({"image_size": image_size} if image_size else {}),
      "placeholders": dict(file.placeholders),
      "tensors": rows,
    }
    dead = [as_it_is[row["name"]] for row in rows if row["action"] == "dead" and keep_dead]
    storage.save(dest, leaves, manifest, dead)
  return manifest


# ---- the way back


_OFFICIAL_TASKS = {"scst": "caption"}  # a run's task -> whose official model is the same


class _Exported:
  """A checkpoint of ours as PyTorch tensors: what each one is, and its value when it is asked for."""

  def __init__(self, path, task, dtype, dead):
    self._path, self._dtype, self._dead = path, dtype, dead
    self._shapes = manager.array_shapes(path)
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
    self._part = functools.lru_cache(maxsize=1)(functools.partial(manager.load_arrays, path))

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
  config = json.loads((path / "config.json").read_text())
  geometry = {
    name: config["model"][name]
    for name in ("embed_dim", "fusion", "vision_heads", *PRESETS["base"])
  }
  words = next(
    shape
    for name, shape in shapes.items()
    if name.startswith("params/") and name.endswith("embeddings/word/embedding")
  )
  return geometry | {"vocab_size": words[0], "pad_id": 0}, [], config["task"]["name"]


def manifest_beside(dest):
  """Where `export_torch` writes its manifest."""
  return f"{dest}.manifest.json"


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


# ---- manifests as text


def _what(row):
  return "mapped" if row["action"] == "map" else f"{row['action']}: {row['why']}"


def summary(manifest):
  """Manifest -> lines of text: how many tensors and numbers were mapped, dropped (why) or made."""
  counts, sizes = collections.Counter(), collections.Counter()
  for row in manifest["tensors"]:
    counts[_what(row)] += 1
    sizes[_what(row)] += int(np.prod(row["shape"]))
  return [
    f"{counts[what]:6d} tensors {sizes[what] / 1e6:9.2f} million  {what}" for what in sorted(counts)
  ]


def tensor_lines(manifest):
  """Manifest of a conversion -> one line of text for each tensor: its key, dtype and shape, and where it went or why nowhere."""
  lines = []
  for row in manifest["tensors"]:
    why = f" ({row['why']})" if row["to"] and row["why"] else ""
    where = f"-> {', '.join(row['to'])}{why}" if row["to"] else _what(row)
    lines.append(f"{row['key']} {row['dtype']}{row['shape']} {where}")
  return lines
