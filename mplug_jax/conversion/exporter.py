"""Exports a checkpoint as PyTorch weights under the official names."""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mplug_jax.checkpoints import reading
from mplug_jax.checkpoints.position_embeddings import LEAF as POSITIONS
from mplug_jax.config.resume import upgrade
from mplug_jax.conversion import mapping, official_inventory, storage
from mplug_jax.conversion.formats.format import Geometry, Shapes
from mplug_jax.conversion.geometry import GEOMETRY
from mplug_jax.conversion.manifest import manifest_beside
from mplug_jax.runtime import atomic_files, files, json_text
from mplug_jax.tensor_files import finite, write

_OFFICIAL_TASKS = {"scst": "caption"}  # our task -> task of the official model with its tensors


class _Plan(NamedTuple):
  """Export of one tensor.

  Attributes:
    action: as in the manifest.
    why: text for the manifest; the name of the other tensor if the action is "tied".
    shape: of the tensor in the file.
    load: makes the tensor; None if tied.
  """

  action: str
  why: str
  shape: tuple[int, ...]
  load: Callable[[], np.ndarray] | None


class _Exported:
  """A checkpoint of this package as PyTorch tensors, which are made on demand."""

  def __init__(
    self,
    path: str | os.PathLike,
    task: str,
    dtype: str | None,
    dead: Mapping[str, Callable[[], np.ndarray]],
  ) -> None:
    self._dtype = dtype
    self._dead = dead
    self._shapes = reading.array_shapes(path)
    if not any(name.startswith("params/") for name in self._shapes):
      raise ValueError(f"{path} holds no parameters.")
    self.geometry, rows, run_task = _describe_checkpoint(files.open_path(path), self._shapes)
    self.task = task or _OFFICIAL_TASKS.get(run_task, run_task)
    self.tensors = self._tensors([] if task else rows)
    self._converters = {
      momentum: mapping.Converter(mapping.online_names(self.tensors, momentum), self.geometry)
      for momentum in (False, True)
    }
    self._rng = np.random.default_rng(0)
    # Keeps one part of the model in memory until another part is read.
    self._part = functools.lru_cache(maxsize=1)(functools.partial(reading.load_arrays, path))

  def _tensors(self, rows: list[dict[str, Any]]) -> dict[str, official_inventory.Tensor]:
    """Returns {PyTorch name: Tensor} of the manifest rows, else of the task's official model."""
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

  def _leaf(self, tree: str, path: str) -> np.ndarray:
    part = f"{tree}/{path.split('/')[0]}"
    return self._part(part)[f"{tree}/{path}".removeprefix(f"{part}/")]

  def describe(self, name: str) -> _Plan:
    """Returns how the tensor of a PyTorch name is exported.

    Raises:
      ValueError: the checkpoint lacks leaves of the tensor.
    """
    tensor = self.tensors[name]
    momentum = name in mapping.online_names([name], momentum=True).values()
    online = next(iter(mapping.online_names([name], momentum)))
    converter = self._converters[momentum]
    entry = converter.entry(online)
    if entry.action == "map":
      return self._describe_mapped(name, entry, momentum)
    if entry.action == "tied":
      other = _momentum_name(entry.text) if momentum else entry.text
      return _Plan("tied", other, tensor.shape, None)
    if entry.action == "constant":
      if name == converter.table.vision_position_ids:
        # The checkpoint may have another resolution than the source.
        tensor = tensor._replace(shape=(1, self._shapes[f"params/{POSITIONS}"][0]))
      load = functools.partial(official_inventory.constant, name, tensor)
      return _Plan("made", entry.text, tensor.shape, load)
    if entry.action == "queue" and f"extra/{name}" in self._shapes:
      return _Plan("map", "", tensor.shape, lambda: self._part("extra")[name])
    if name in self._dead:
      why = "kept from the source: " + entry.text
      return _Plan("dead", why, tensor.shape, self._dead[name])
    load = functools.partial(official_inventory.initial, name, tensor, self._rng)
    return _Plan("dead", "by the official initialization: " + entry.text, tensor.shape, load)

  def _describe_mapped(self, name: str, entry: mapping.Entry, momentum: bool) -> _Plan:
    tree, why = self._tree(name, entry, momentum)
    shape = self.tensors[name].shape
    if entry.paths == (POSITIONS,):  # may have another resolution than the source
      shape = self._shapes[f"{tree}/{POSITIONS}"]
    leaf = functools.partial(self._leaf, tree)
    load = functools.partial(mapping.tensor_to_torch, entry, leaf, shape)
    return _Plan("made" if why else "map", why, shape, load)

  def _tree(self, name: str, entry: mapping.Entry, momentum: bool) -> tuple[str, str]:
    """Returns the tree with the leaves of the entry, and why it is not the expected one or ""."""
    if momentum and all(f"ema_params/{path}" in self._shapes for path in entry.paths):
      return "ema_params", ""
    if missing := [path for path in entry.paths if f"params/{path}" not in self._shapes]:
      raise ValueError(
        f"{name} of the official {self.task} model needs {missing[0]}, which the checkpoint does "
        "not have; pass the task that it was trained for, with --task."
      )
    why = "copied from the online weights: the checkpoint has no average" if momentum else ""
    return "params", why

  def dtype(self, name: str) -> np.dtype:
    """Returns the dtype in the file; integers and booleans keep theirs."""
    stored = self.tensors[name].dtype
    keep = self._dtype is None or stored.startswith(("int", "bool"))
    return np.dtype(stored if keep else self._dtype)


def _momentum_name(name: str) -> str:
  head, dot, rest = name.partition(".")
  return f"{head}_m{dot}{rest}"


def _describe_checkpoint(
  path: files.AnyPath, shapes: Shapes
) -> tuple[Geometry, list[dict[str, Any]], str]:
  """Returns fields of MPlug, manifest rows ([] for a run) and the task ("" if converted)."""
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


def export_torch(
  path: str | os.PathLike,
  dest: str | os.PathLike,
  *,
  task: str = "",
  slim: bool = False,
  dtype: str | None = None,
  overwrite: bool = True,
  allow_nonfinite: bool = False,
) -> dict[str, Any]:
  """Writes a checkpoint as PyTorch weights with official names, and a manifest next to the file.

  One part of the model (an encoder, the decoder) is in memory at a time.

  Args:
    path: converted folder or file, or run folder.
    dest: file, .pth or .safetensors; both it and the manifest are replaced only once complete.
    task: official model whose tensors are written; "" for the source's, or for the run's task.
    slim: leave out the tensors that never run.
    dtype: of floating-point tensors; None for the source's.
    overwrite: replace a file that is no earlier export, which has a manifest next to it.
    allow_nonfinite: export values that are NaN or infinite as they are.

  Returns:
    The manifest: {"source", "task", "tensors": rows}.

  Raises:
    ValueError: the checkpoint is unusable, or a value of it is not finite; nothing is written.
    FileNotFoundError: there is no such checkpoint.
    FileExistsError: see `overwrite`.
    OSError: the file could not be written; nothing of it remains.
  """
  files.require_local(dest, "a PyTorch file")
  if os.path.exists(dest) and os.path.samefile(path, dest):
    raise ValueError(f"{dest} is the checkpoint itself; choose another destination.")
  with storage.open_dead(path) as dead:
    source = _Exported(path, task, dtype, dead)
    rows, tensors = _plan(source, slim, allow_nonfinite)
    manifest = {"source": str(path), "task": source.task, "tensors": rows}
    files.require_new(dest, overwrite or os.path.exists(manifest_beside(dest)))
    try:
      _write_export(dest, tensors, manifest)
    except finite.NonFiniteError as error:
      raise _refusal(path, source, rows, dtype, error) from error
  return manifest


def _plan(
  source: _Exported, slim: bool, allow_nonfinite: bool
) -> tuple[list[dict[str, Any]], list[write.Tensor]]:
  """Returns the rows of the manifest, and the tensors to write."""
  rows = []
  tensors = []
  for name in source.tensors:
    plan = source.describe(name)
    if slim and plan.action == "dead":
      continue
    result = source.dtype(name)
    rows.append(
      {
        "name": name,
        "shape": list(plan.shape),
        "dtype": str(result),
        "action": plan.action,
        "why": plan.why,
      }
    )
    if plan.load is None:
      tensors.append(write.Tensor(name, plan.shape, result, same_as=plan.why))
      continue
    load = functools.partial(_load_as, plan.load, result)
    if plan.action == "map" and not allow_nonfinite:
      load = finite.checked(name, load)
    tensors.append(write.Tensor(name, plan.shape, result, load))
  return rows, tensors


def _refusal(
  path: str | os.PathLike,
  source: _Exported,
  rows: list[dict[str, Any]],
  dtype: str | None,
  error: finite.NonFiniteError,
) -> ValueError:
  """Returns an error that names all tensors with values that are not finite."""
  counts = {}
  for row in rows:
    load = source.describe(row["name"]).load if row["action"] == "map" else None
    if load and (count := finite.count_nonfinite(load())):
      counts[row["name"]] = count
  if counts:
    return ValueError(
      f"{path}: {finite.describe(counts)}. A model computes nothing useful with them: use another "
      "checkpoint, or pass --allow_nonfinite to export them as they are."
    )
  return ValueError(
    f"{path}: values of {error.name} are too large for {dtype}; choose another --dtype."
  )


def _load_as(load: Callable[[], np.ndarray], dtype: np.dtype) -> np.ndarray:
  with np.errstate(over="ignore"):  # infinite values are found afterwards
    return load().astype(dtype, copy=False)


def _write_export(
  dest: str | os.PathLike, tensors: list[write.Tensor], manifest: dict[str, Any]
) -> None:
  """Writes both files or neither: the manifest's temporary file is on disk before the tensors."""
  save = write.save_safetensors if str(dest).endswith(".safetensors") else write.save_pth
  try:
    pathlib.Path(dest).parent.mkdir(parents=True, exist_ok=True)
    with atomic_files.open_atomic(manifest_beside(dest)) as file:
      file.write((json_text.dumps(manifest, indent=2) + "\n").encode())
      file.flush()
      save(dest, tensors)
  except OSError as error:
    raise storage.not_written(dest, error) from error
