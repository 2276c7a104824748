"""Whole checkpoints across the border: PyTorch files -> ours, ours -> PyTorch files, and the manifest of what became of each tensor.

A manifest has a row for each PyTorch tensor. Its "action": "map" (a parameter), "queue" (kept beside the parameters), "dead" (never
run), "tied" (the same as another), "constant" (follows from the model) or "made" (written without a parameter of its own).
"""

import collections
import functools
import os

import jax.numpy as jnp
import numpy as np

from mplug_jax.checkpoints.position_embeddings import LEAF as POSITIONS
from mplug_jax.checkpoints.position_embeddings import resize_positions
from mplug_jax.conversion import mapping, storage
from mplug_jax.conversion.geometry import infer_geometry
from mplug_jax.conversion.names import config_beside, official_names
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
