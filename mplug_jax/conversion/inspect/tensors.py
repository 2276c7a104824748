"""Any checkpoint as named leaves that are read a few at a time: run folders, converted ones, Orbax directories, PyTorch files.

Beside the leaves: what is known without reading numbers, as `Leaves.facts`.
"""

import contextlib
import json
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mplug_jax.checkpoints import errors, manager, orbax_logging
from mplug_jax.config.resume import rename
from mplug_jax.conversion import mapping, storage
from mplug_jax.conversion.geometry import GEOMETRY, infer_geometry
from mplug_jax.conversion.names import config_beside, official_names
from mplug_jax.data.text.tokenizer_base import CONFIG_FILE
from mplug_jax.tensor_files import open

_BATCH = (
  64 << 20
)  # bytes that are read at once: opening an Orbax directory for every bias would take most of the time
# Fields of a run's config.model that are the model's geometry; the others are how it computes.


class Leaf(NamedTuple):
  """One array: shape of ints, numpy dtype, sharding as text, "-" where none is stored."""

  shape: tuple[int, ...]
  dtype: np.dtype
  sharding: str = "-"

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize


class Leaves:
  """An opened checkpoint.

  Attributes:
    kind: what it is, in words.
    facts: {what: text or number}, in the order to be shown in.
    geometry: fields of MPlug, {} if unknown.
    config: config.json of the run as a dictionary, {} if there is none.
    leaves: {name: Leaf}, in the checkpoint's order.
  """

  def __init__(
    self, kind, leaves, read, facts=None, geometry=None, config=None, close=lambda: None
  ):
    self.kind, self.leaves = kind, leaves
    self.facts, self.geometry, self.config = facts or {}, geometry or {}, config or {}
    self._read, self.close = read, close

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()

  def read(self, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array) in the order given; at most one batch of 64 MiB, or one larger leaf, is in memory.

    Raises:
      checkpoint.CheckpointError, ValueError: a leaf cannot be read.
    """
    batch, size = [], 0
    for name in names:
      if batch and size + self.leaves[name].nbytes > _BATCH:
        yield from self._drain(batch)
        batch, size = [], 0
      batch.append(name)
      size += self.leaves[name].nbytes
    yield from self._drain(batch)

  def _drain(self, batch):
    arrays = self._read(batch)
    for name in batch:
      yield name, arrays.pop(name)


def open_leaves(path) -> Leaves:
  """Opens a run folder, its `checkpoints` folder, one checkpoint, a converted folder, an Orbax directory or PyTorch weights.

  Of a run the newest checkpoint is read.

  Raises:
    FileNotFoundError: no such path, or a folder without a checkpoint.
    ValueError, checkpoint.CheckpointError: damaged, or no checkpoint at all.
  """
  path = pathlib.Path(path).absolute()
  if not path.is_dir():
    return _open_file(path)
  for parent in (p for p in (path / manager.DIRECTORY, path) if p.exists()):
    steps = _steps(parent)
    if steps:
      return _open_run(parent / str(steps[-1]), "run folder", steps)
  if description := storage.read_description(path):
    geometry, manifest = description
    return _open_orbax(
      path / "state",
      "converted checkpoint",
      {"converted from": manifest.get("source", "unknown")},
      geometry,
    )
  if (path / "state" / "_METADATA").exists():
    return _open_run(path, "checkpoint of a run", _steps(path.parent))
  if (path / "_METADATA").exists():
    return _open_orbax(path, "Orbax directory")
  try:
    return _open_file(path)
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"{path} holds no checkpoint: neither a run (checkpoints/<step>), a converted checkpoint (model.json), "
      "an Orbax directory nor PyTorch weights."
    ) from error


def _steps(folder):
  return sorted(
    found.step for found in ocp.path.step.standard_name_format().find_all(epath.Path(folder))
  )


def _json(path):
  try:
    value = json.loads(path.read_text())
  except (ValueError, OSError) as error:
    raise ValueError(f"{path} cannot be read as json ({error}).") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} holds no json object.")
  return value


# ---- runs and Orbax


def _open_run(path, kind, steps):
  """`path`: folder of one checkpoint; its run, if it still lies in one, is two folders up."""
  run = path.parent.parent
  facts = {"step": f"{path.name}; there are {', '.join(map(str, steps))}" if steps else "unknown"}
  if (path / "metrics" / "metrics").exists():
    facts["metrics"] = ", ".join(
      f"{name}={value}" for name, value in _json(path / "metrics" / "metrics").items()
    )
  facts |= _tokenizer(path, run / "tokenizer" / CONFIG_FILE)
  config = rename(_json(run / "config.json")) if (run / "config.json").exists() else {}
  found = _open_orbax(path / "state", kind, facts, config=config)
  if config:
    # A vocabulary of 0 in the config follows the tokenizer; the word table says what came of it.
    words = [
      leaf.shape[0]
      for name, leaf in found.leaves.items()
      if name.endswith("embeddings/word/embedding") and leaf.shape
    ]
    model = config.get("model", {})
    found.geometry = {name: model[name] for name in GEOMETRY if name in model} | (
      {"vocab_size": words[0]} if words else {}
    )
  return found


def _tokenizer(path, file):
  """{"tokenizer": fingerprint, and whether the checkpoint records the same one}; {} if neither is known."""
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
    "tokenizer": f"sha256 {recorded or 'not recorded'} in the checkpoint, {present or 'no file'} in {file.parent}"
  }


def _open_orbax(path, kind, facts=None, geometry=None, config=None):
  orbax_logging.quiet()
  try:
    tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(path)).tree
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(where, simple=True, separator="/") for where, _ in flat]
    # Texts have no shape; no state of ours holds any.
    leaves = {
      name: Leaf(tuple(x.shape), np.dtype(x.dtype), _sharding(x))
      for name, (_, x) in zip(names, flat, strict=True)
      if getattr(x, "shape", None) is not None
    }
  except Exception as error:  # a damaged directory fails in any way
    raise errors.CheckpointError(f"{path} cannot be read ({errors.reason(error)}).") from error

  def read(wanted):
    wanted = set(wanted)
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


def _sharding(metadata):
  """PartitionSpec as text: P(-,fsdp,tensor), a dimension over several axes as data+fsdp."""
  spec = getattr(metadata.sharding, "partition_spec", None)
  if spec is None:
    return "-"
  return f"P({','.join('-' if axes is None else axes if isinstance(axes, str) else '+'.join(axes) for axes in spec)})"


# ---- PyTorch weights, and our own trees as safetensors


def _open_file(path):
  file = open.open_tensors(path)
  leaves = {name: Leaf(tuple(file.shape(name)), file.dtype(name)) for name in file}
  facts = {}
  if file.wrapper:
    facts["tensors under"] = file.wrapper
  for what, values in (("not run", file.placeholders), ("beside them", file.ignored)):
    if values:
      facts[what] = ", ".join(f"{name} ({value})" for name, value in values.items())
  kind, geometry = "PyTorch weights", {}
  if "geometry" in file.metadata:
    geometry, manifest = storage.read_description(path)
    kind, facts["converted from"] = (
      "converted checkpoint in one file",
      manifest.get("source", "unknown"),
    )
  elif file.metadata:
    facts["metadata"] = ", ".join(f"{name}={text}" for name, text in file.metadata.items())
  with contextlib.suppress(
    ValueError, KeyError
  ):  # weights of something else: the list of tensors is all there is to say
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
