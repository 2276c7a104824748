"""Converts PyTorch checkpoints, with a manifest of the destination of each tensor.

A manifest has a row for each PyTorch tensor. Its "action" is "map" (a parameter), "queue" (stored
next to the parameters), "dead" (never run), "tied" (the same as another), "constant" (follows from
the model) or "made" (written without a separate parameter).
"""

import collections
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mplug_jax.checkpoints.position_embeddings import LEAF as POSITIONS
from mplug_jax.checkpoints.position_embeddings import resize_positions
from mplug_jax.conversion import mapping, storage
from mplug_jax.conversion.formats.format import Geometry
from mplug_jax.conversion.geometry import infer_geometry
from mplug_jax.conversion.names import config_beside, official_names
from mplug_jax.tensor_files import finite, open, write
from mplug_jax.tensor_files.tensor_file import TensorFile

_Piece = tuple[str, mapping.Entry, int]  # name in the source, Entry, index among the entry's leaves


class _Source:
  """The tensors of a file under their table names, read on access."""

  def __init__(self, file: TensorFile) -> None:
    self._file = file
    self.keys = official_names(file.keys())

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._file.shape(self.keys[name]))

  def dtype(self, name: str) -> np.dtype:
    return self._file.dtype(self.keys[name])

  def __getitem__(self, name: str) -> np.ndarray:
    return self._file[self.keys[name]]


def _check_tied(
  source: _Source, names: Mapping[str, str], entries: Mapping[str, mapping.Entry]
) -> None:
  """Raises ValueError if two names of one tensor have different bytes; loads both at a time."""
  for name, entry in entries.items():
    if entry.action == "tied" and entry.text in names:
      pair = names[name], names[entry.text]
      first, second = (np.ascontiguousarray(source[key]).reshape(-1).view(np.uint8) for key in pair)
      if not np.array_equal(first, second):
        raise ValueError(mapping.untied(*pair))


def _leaves(
  source: _Source,
  names: Mapping[str, str],
  entries: Mapping[str, mapping.Entry],
  geometry: Geometry,
  dtype: Any,
) -> dict[str, write.Tensor]:
  """Returns {path of a leaf: Tensor}, each made only when it is written.

  Args:
    source: the file.
    names: {name of an online weight: name in the source}.
    entries: {name of an online weight: its mapping}.
    geometry: fields of MPlug.
    dtype: of the leaves; None for the one that represents a leaf's tensors without loss.
  """
  pieces: dict[str, list[_Piece]] = collections.defaultdict(list)
  for name, entry in entries.items():
    for i, path in enumerate(entry.paths):
      pieces[path].append((names[name], entry, i))
  shapes = mapping.leaf_shapes(geometry)
  leaves = {}
  for path, parts in pieces.items():
    stored = {source.dtype(name) for name, *_ in parts}
    result = np.dtype(dtype or functools.reduce(jnp.promote_types, stored))
    leaves[path] = write.Tensor(
      path, shapes[path], result, functools.partial(_make, source, parts, shapes[path], result)
    )
  return leaves


def _make(
  source: _Source, parts: list[_Piece], shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
  leaf = np.empty(shape, dtype)
  for name, entry, i in parts:
    index = entry.indices[i]
    with np.errstate(over="ignore"):  # infinite values are found when the leaf is complete
      _copy(entry.forward(source[name])[i], leaf[... if index is None else index])
  return leaf


def _copy(array: np.ndarray, to: np.ndarray) -> None:
  """Copies an array; a transposed matrix by 16 columns, a cache line, in a fifth of the time."""
  if array.ndim != 2 or not array.flags.f_contiguous:
    to[...] = array
    return
  for i in range(0, array.shape[1], 16):
    to[:, i : i + 16] = array[:, i : i + 16]


def _resize(leaves: dict[str, write.Tensor], tokens: int, zero: bool) -> str:
  """Resizes the position table in `leaves`, or fills it with zeros; returns a manifest note."""
  table = leaves[POSITIONS]
  shape = (tokens, *table.shape[1:])

  def load() -> np.ndarray:
    if zero:
      return np.zeros(shape, table.dtype)
    return np.asarray(resize_positions(table.make(), tokens).astype(table.dtype))

  leaves[POSITIONS] = table._replace(shape=shape, load=load)
  if zero:
    return "replaced by zeros"
  return f"resized from {table.shape[0]} to {tokens} positions" if shape != table.shape else ""


def _tokens(geometry: Geometry, image_size: int) -> int:
  """Returns the rows of a position table for images of `image_size` pixels."""
  patch = geometry["patch_size"]
  if image_size < patch or image_size % patch:
    raise ValueError(
      f"--image_size={image_size} is no multiple of the image encoder's patch size {patch}."
    )
  return 1 + (image_size // patch) ** 2


def _row(
  source: _Source, name: str, entry: mapping.Entry, tree: str, resized: str
) -> dict[str, Any]:
  """Returns the manifest row of one tensor."""
  to = []
  why = entry.text
  if entry.action == "map":
    leaves = zip(entry.paths, entry.indices, strict=True)
    to = [f"{tree}/{path}" if i is None else f"{tree}/{path}[{i}]" for path, i in leaves]
    why = resized if POSITIONS in entry.paths else ""
  elif entry.action == "queue":
    to = [f"extra/{name}"]
    why = "kept in addition to the parameters"
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
  path: str | os.PathLike,
  dest: str | os.PathLike,
  *,
  image_size: int = 0,
  dtype: str | None = None,
  zero_positions: bool = False,
  keep_dead: bool = False,
  allow_nonfinite: bool = False,
  **overrides: Any,
) -> dict[str, Any]:
  """Converts a PyTorch checkpoint to one for `init_from`, `export_torch` and `load_params`.

  One leaf at a time is in memory. Names, shapes and tied copies are checked before writing.

  Args:
    path: file or folder, as for `tensor_files.open.open_tensors`.
    dest: new folder, or new file with the suffix .safetensors.
    image_size: pixels to resize the position tables to; 0 keeps them.
    dtype: of the result, for example "float32"; None keeps each tensor's.
    zero_positions: write position tables of zeros, as in the official start from CLIP
      (docs/official.md item 1).
    keep_dead: also keep the tensors that never run, for a later export.
    allow_nonfinite: convert values that are NaN or infinite as they are. They are counted in
      "nonfinite" of the manifest. Tensors that never run are not checked.
    **overrides: fields of MPlug that the shapes do not determine, see `infer_geometry`.

  Returns:
    The manifest: {"source", "geometry", "placeholders", "tensors": rows}.

  Raises:
    ValueError: the file is unusable or does not fit a model, or a value of it is not finite;
      nothing is written.
    FileNotFoundError: there is no such checkpoint.
    FileExistsError: `dest` exists.
    OSError: the result could not be written; nothing of it remains.
  """
  if os.path.lexists(dest):
    raise FileExistsError(f"{dest} exists already; choose another destination or remove it.")
  with open.open_tensors(path) as file:
    _refuse_converted(path, file)
    source = _Source(file)
    shapes = {name: source.shape(key) for name, key in mapping.online_names(source.keys).items()}
    geometry = infer_geometry(shapes, **config_beside(path) | overrides)
    tokens = _tokens(geometry, image_size or geometry["image_size"])
    rows, leaves = _convert_trees(source, geometry, tokens, dtype, zero_positions)
    queues, dead = _queues_and_dead(source, rows)
    leaves += queues
    if image_size:
      geometry["image_size"] = image_size
    manifest: dict[str, Any] = {"source": str(path), "geometry": geometry, "tensors": rows}
    manifest["placeholders"] = dict(file.placeholders)
    if not allow_nonfinite:
      leaves = [_checked(leaf) for leaf in leaves]
    elif counts := _nonfinite(source, rows):
      manifest["nonfinite"] = counts
    try:
      storage.save(dest, leaves, manifest, dead if keep_dead else [])
    except finite.NonFiniteError as error:
      raise _refusal(path, source, rows, dtype, error) from error
  return manifest


def _queues_and_dead(
  source: _Source, rows: list[dict[str, Any]]
) -> tuple[list[write.Tensor], list[write.Tensor]]:
  """Returns the queues under their names here, and the tensors that never run."""
  unmapped = _unmapped(source, rows)
  queues = [
    unmapped[row["name"]]._replace(name=row["to"][0]) for row in rows if row["action"] == "queue"
  ]
  return queues, [unmapped[row["name"]] for row in rows if row["action"] == "dead"]


def _refuse_converted(path: str | os.PathLike, file: TensorFile) -> None:
  """Raises ValueError for a file that is converted already."""
  if "geometry" in file.metadata:
    raise ValueError(
      f"{path} is already a converted checkpoint; use tools.export_torch to make PyTorch weights."
    )


def _checked(leaf: write.Tensor) -> write.Tensor:
  """Returns a leaf that raises NonFiniteError when it is made with a value that is not finite."""
  return leaf._replace(load=finite.checked(leaf.name, leaf.make))


def _nonfinite(source: _Source, rows: list[dict[str, Any]]) -> dict[str, int]:
  """Returns {key: number of values that are not finite} of the tensors that have a destination."""
  counts = {
    row["key"]: finite.count_nonfinite(source[row["name"]])
    for row in rows
    if row["action"] in ("map", "queue")
  }
  return {key: count for key, count in counts.items() if count}


def _refusal(
  path: str | os.PathLike,
  source: _Source,
  rows: list[dict[str, Any]],
  dtype: Any,
  error: finite.NonFiniteError,
) -> ValueError:
  """Returns an error that names all tensors with values that are not finite."""
  if counts := _nonfinite(source, rows):
    return ValueError(
      f"{path}: {finite.describe(counts)}. A model computes nothing useful with them: use another "
      "checkpoint, or pass --allow_nonfinite to convert them as they are."
    )
  return ValueError(
    f"{path}: values of {error.name} are too large for {dtype}; choose another --dtype."
  )


def _convert_trees(
  source: _Source, geometry: Geometry, tokens: int, dtype: Any, zero_positions: bool
) -> tuple[list[dict[str, Any]], list[write.Tensor]]:
  """Returns the manifest rows and the leaves of the parameters and of their momentum copies."""
  plans = []
  for tree, momentum in (("params", False), ("ema_params", True)):
    if names := mapping.online_names(source.keys, momentum):
      shapes = {name: source.shape(key) for name, key in names.items()}
      plans.append((tree, names, mapping.plan(shapes, geometry)))
  rows = []
  leaves = []
  for tree, names, entries in plans:
    _check_tied(source, names, entries)
    tensors = _leaves(source, names, entries, geometry, dtype)
    resized = _resize(tensors, tokens, zero_positions) if POSITIONS in tensors else ""
    leaves += [leaf._replace(name=f"{tree}/{leaf.name}") for leaf in tensors.values()]
    rows += [_row(source, names[name], entry, tree, resized) for name, entry in entries.items()]
  return rows, leaves


def _unmapped(source: _Source, rows: list[dict[str, Any]]) -> dict[str, write.Tensor]:
  """Returns {name: Tensor} of the queues and the unused tensors, as in the source."""
  return {
    row["name"]: write.Tensor(
      row["name"],
      tuple(row["shape"]),
      np.dtype(source.dtype(row["name"])),
      functools.partial(source.__getitem__, row["name"]),
    )
    for row in rows
    if row["action"] in ("queue", "dead")
  }
