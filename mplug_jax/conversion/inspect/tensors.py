"""Lazy named leaves of any checkpoint: runs, converted ones, Orbax directories, PyTorch files.

`Leaves.facts` has further properties that are known without reading values.
"""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mplug_jax.checkpoints import errors, manager, orbax_logging
from mplug_jax.checkpoints.shapes import saved_tree
from mplug_jax.config.resume import rename
from mplug_jax.conversion import mapping, storage
from mplug_jax.conversion.geometry import GEOMETRY, infer_geometry
from mplug_jax.conversion.names import config_beside, official_names
from mplug_jax.data.text.tokenizer_base import CONFIG_FILE
from mplug_jax.parallel.rules import path_name
from mplug_jax.runtime import files
from mplug_jax.tensor_files import open

# Bytes read at once: opening an Orbax directory for every bias would take most of the time.
_BATCH = 64 << 20


class Leaf(NamedTuple):
  """One array; the sharding is text, "-" if none is stored."""

  shape: tuple[int, ...]
  dtype: np.dtype
  sharding: str = "-"

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Size in bytes."""
    return self.size * self.dtype.itemsize


class Leaves:
  """An opened checkpoint.

  Attributes:
    kind: description of the kind of checkpoint.
    facts: {property: text or number}, in display order.
    geometry: fields of MPlug, {} if unknown.
    config: config.json of the run as a dictionary, {} if there is none.
    leaves: {name: Leaf}, in the checkpoint's order.
  """

  def __init__(
    self,
    kind: str,
    leaves: dict[str, Leaf],
    read: Callable[[list[str]], dict[str, np.ndarray]],
    facts: dict[str, Any] | None = None,
    geometry: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    close: Callable[[], None] = lambda: None,
  ) -> None:
    self.kind = kind
    self.leaves = leaves
    self.facts = facts or {}
    self.geometry = geometry or {}
    self.config = config or {}
    self._read = read
    self.close = close

  def __enter__(self) -> "Leaves":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self.close()

  def read(self, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array) in the given order.

    At most one batch of 64 MiB, or one larger leaf, is in memory.

    Raises:
      CheckpointError: a leaf of an Orbax directory cannot be read.
      ValueError: a leaf of a file cannot be read.
    """
    batch = []
    size = 0
    for name in names:
      if batch and size + self.leaves[name].nbytes > _BATCH:
        yield from self._drain(batch)
        batch = []
        size = 0
      batch.append(name)
      size += self.leaves[name].nbytes
    yield from self._drain(batch)

  def _drain(self, batch: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    arrays = self._read(batch)
    for name in batch:
      yield name, arrays.pop(name)


def open_leaves(path: str | os.PathLike) -> Leaves:
  """Opens a checkpoint of any kind.

  Args:
    path: a run folder or its `checkpoints` folder (the newest checkpoint is read), one checkpoint,
      a converted folder, an Orbax directory or PyTorch weights.

  Raises:
    FileNotFoundError: no such path, or a folder without a checkpoint.
    CheckpointError: the Orbax directory is damaged.
    ValueError: the file is damaged or not a checkpoint.
  """
  root = files.absolute(path)
  if not root.is_dir():
    return _open_file(root)
  for parent in (p for p in (root / manager.DIRECTORY, root) if p.exists()):
    steps = _steps(parent)
    if steps:
      return _open_run(parent / str(steps[-1]), "run folder", steps)
  if description := storage.read_description(root):
    geometry, manifest = description
    return _open_orbax(
      root / "state",
      "converted checkpoint",
      {"converted from": manifest.get("source", "unknown")},
      geometry,
    )
  if (root / "state" / "_METADATA").exists():
    return _open_run(root, "checkpoint of a run", _steps(root.parent))
  if (root / "_METADATA").exists():
    return _open_orbax(root, "Orbax directory")
  try:
    return _open_file(root)
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"{root} holds no checkpoint: neither a run (checkpoints/<step>), a converted checkpoint "
      "(model.json), an Orbax directory nor PyTorch weights."
    ) from error


def _steps(folder: pathlib.Path) -> list[int]:
  names = ocp.path.step.standard_name_format()
  return sorted(name.step for name in names.find_all(epath.Path(folder)))


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text())
  except (ValueError, OSError) as error:
    raise ValueError(f"{path} cannot be read as JSON ({error}).") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} is not a JSON object.")
  return value


# ---- runs and Orbax


def _open_run(path: pathlib.Path, kind: str, steps: list[int]) -> Leaves:
  """Opens the folder of one checkpoint; the files of its run, if any, are two folders up."""
  run = path.parent.parent
  facts = {"step": f"{path.name}; there are {', '.join(map(str, steps))}" if steps else "unknown"}
  if (path / "metrics" / "metrics").exists():
    facts["metrics"] = ", ".join(
      f"{name}={value}" for name, value in _json(path / "metrics" / "metrics").items()
    )
  facts |= _tokenizer(path, run / "tokenizer" / CONFIG_FILE)
  config = rename(_json(run / "config.json")) if (run / "config.json").exists() else {}
  opened = _open_orbax(path / "state", kind, facts, config=config)
  if config:
    # A vocabulary of 0 in the config follows the tokenizer; the word table has the actual size.
    words = [
      leaf.shape[0]
      for name, leaf in opened.leaves.items()
      if name.endswith("embeddings/word/embedding") and leaf.shape
    ]
    model = config.get("model", {})
    opened.geometry = {name: model[name] for name in GEOMETRY if name in model} | (
      {"vocab_size": words[0]} if words else {}
    )
  return opened


def _tokenizer(path: pathlib.Path, file: pathlib.Path) -> dict[str, str]:
  """Compares the tokenizer's fingerprint with the checkpoint's; {} if neither is known."""
  recorded = (
    _json(path / "data" / "metadata").get("tokenizer")
    if (path / "data" / "metadata").exists()
    else None
  )
  present = _json(file).get("fingerprint") if file.exists() else None
  if not recorded and not present:
    return {}
  if recorded == present:
    return {
      "tokenizer": f"{_json(file).get('kind')}, sha256 {present}, as the checkpoint records it"
    }
  return {
    "tokenizer": (
      f"sha256 {recorded or 'not recorded'} in the checkpoint, "
      f"{present or 'no file'} in {file.parent}"
    )
  }


def _open_orbax(
  path: pathlib.Path,
  kind: str,
  facts: dict[str, Any] | None = None,
  geometry: dict[str, Any] | None = None,
  config: dict[str, Any] | None = None,
) -> Leaves:
  orbax_logging.quiet()
  try:
    flat, treedef = jax.tree_util.tree_flatten_with_path(saved_tree(epath.Path(path)))
    names = [path_name(key) for key, _ in flat]
    # Text leaves have no shape.
    leaves = {
      name: Leaf(tuple(x.shape), np.dtype(x.dtype), _sharding(x))
      for name, (_, x) in zip(names, flat, strict=True)
      if getattr(x, "shape", None) is not None
    }
  except Exception as error:  # a damaged directory fails in any way
    raise errors.CheckpointError(f"{path} cannot be read ({errors.reason(error)}).") from error

  def read(selected: list[str]) -> dict[str, np.ndarray]:
    wanted = set(selected)
    target = jax.tree.unflatten(
      treedef,
      [
        jax.ShapeDtypeStruct(x.shape, x.dtype) if name in wanted else ocp.PLACEHOLDER
        for name, (_, x) in zip(names, flat, strict=True)
      ],
    )
    items = ocp.args.PyTreeRestore(
      target, restore_args=jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray), target)
    )
    try:
      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        arrays = treedef.flatten_up_to(checkpointer.restore(epath.Path(path), args=items))
    except Exception as error:
      raise errors.CheckpointError(f"{path} cannot be read ({errors.reason(error)}).") from error
    return {name: np.asarray(x) for name, x in zip(names, arrays, strict=True) if name in wanted}

  return Leaves(kind, leaves, read, facts, geometry, config)


def _sharding(metadata: Any) -> str:
  """Formats a PartitionSpec: P(-,fsdp,tensor), a dimension over several axes as data+fsdp."""
  spec = getattr(metadata.sharding, "partition_spec", None)
  if spec is None:
    return "-"
  texts = (
    "-" if axes is None else axes if isinstance(axes, str) else "+".join(axes) for axes in spec
  )
  return f"P({','.join(texts)})"


# ---- PyTorch weights, and parameter trees as safetensors


def _open_file(path: pathlib.Path) -> Leaves:
  file = open.open_tensors(path)
  leaves = {name: Leaf(tuple(file.shape(name)), file.dtype(name)) for name in file}
  facts = {}
  if file.wrapper:
    facts["tensors under"] = file.wrapper
  for title, values in (("not run", file.placeholders), ("ignored", file.ignored)):
    if values:
      facts[title] = ", ".join(f"{name} ({value})" for name, value in values.items())
  kind = "PyTorch weights"
  geometry = {}
  if "geometry" in file.metadata and (description := storage.read_description(path)):
    geometry, manifest = description
    kind = "converted checkpoint in one file"
    facts["converted from"] = manifest.get("source", "unknown")
  elif file.metadata:
    facts["metadata"] = ", ".join(f"{name}={text}" for name, text in file.metadata.items())
  # Weights of an unknown model have no geometry.
  with contextlib.suppress(ValueError, KeyError):
    names = official_names(leaves)
    shapes = {name: leaves[names[key]].shape for name, key in mapping.online_names(names).items()}
    geometry = geometry or infer_geometry(shapes, **config_beside(path))
  return Leaves(
    kind,
    leaves,
    lambda names: {name: file[name] for name in names},
    facts,
    geometry,
    close=file.close,
  )
