"""Converted checkpoints on disk, written a few leaves at a time and atomically.

Folder: state/ (Orbax: params, ema_params from momentum copies, extra with the queues), model.json
(fields of MPlug), manifest.json, and on request dead_weights.safetensors with the tensors that
never run.

Safetensors file: the same leaves as "params/text_encoder/...", "ema_params/...", "extra/...", the
tensors that never run as "dead/" and their PyTorch name, and in its metadata the texts "geometry"
and "manifest".
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from mplug_jax.checkpoints import errors as errors_lib
from mplug_jax.checkpoints import orbax_logging, reading
from mplug_jax.conversion.formats.format import Geometry
from mplug_jax.runtime import atomic_files, files, json_text
from mplug_jax.tensor_files import open
from mplug_jax.tensor_files import write as torch_write

_DEAD_FILE = "dead_weights.safetensors"
# Leaves written together: each write waits for the disk once, as long as writing some megabytes.
_BATCH_BYTES = 64 << 20
_BATCH_LEAVES = 32


class _NotMade(Exception):
  """Carries an error raised while making a leaf through Orbax, apart from errors of writing."""

  def __init__(self, error: Exception) -> None:
    super().__init__(str(error))
    self.error = error


class _Leaf:
  """A Tensor with the attributes Orbax needs; JAX would treat the tuple itself as a subtree."""

  def __init__(self, tensor: torch_write.Tensor) -> None:
    self.shape = tensor.shape
    self.dtype = np.dtype(tensor.dtype)
    self.size = math.prod(tensor.shape)
    self.nbytes = self.size * self.dtype.itemsize
    self._make = tensor.make

  def make(self) -> np.ndarray:
    try:
      return self._make()
    except Exception as error:
      raise _NotMade(error) from error


class _LeafHandler(ocp.type_handlers.NumpyHandler):
  """Makes and writes a few leaves at a time; Orbax's own handlers copy all leaves before writing.

  The result is read like any numpy array.
  """

  async def serialize(
    self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
  ) -> list[Any]:
    write_one = super().serialize
    for batch in _batches(zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True)):
      arrays = [value.make() for value, _, _ in batch]
      # One call per leaf: if a write of a call fails, the others are abandoned but not ended.
      writes = [
        write
        for array, (_, info, arg) in zip(arrays, batch, strict=True)
        for write in await write_one([array], [info], [arg])
      ]
      if errors := [error for write in writes if (error := _failure(write))]:
        raise errors[0]
    return []


def _failure(write: Any) -> Exception | None:
  """Waits for a write; returns its error, None if it succeeded."""
  try:
    write.result()
  except Exception as error:
    return error
  return None


def _batches(leaves: Iterable[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
  """Yields lists of tuples (a _Leaf first), small enough to be in memory and written together."""
  batch = []
  size = 0
  for leaf in leaves:
    if batch and (size + leaf[0].nbytes > _BATCH_BYTES or len(batch) == _BATCH_LEAVES):
      yield batch
      batch = []
      size = 0
    batch.append(leaf)
    size += leaf[0].nbytes
  yield batch


def _save_state(path: pathlib.Path, leaves: Iterable[torch_write.Tensor]) -> None:
  tree = traverse_util.unflatten_dict({leaf.name: _Leaf(leaf) for leaf in leaves}, sep="/")
  # Orbax warns about a registry without jax.Array, though the tree has none.
  registry = ocp.type_handlers.create_type_handler_registry(
    (_Leaf, _LeafHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
  )
  # Compressing takes longer than writing, and saves a tenth of trained float32 numbers.
  handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(path, args=ocp.args.PyTreeSave(tree))


def _save_folder(
  dest: pathlib.Path,
  leaves: Iterable[torch_write.Tensor],
  manifest: Mapping[str, Any],
  dead: Sequence[torch_write.Tensor],
) -> None:
  partial = dest.with_name(f"{dest.name}.partial{os.getpid()}").absolute()
  try:
    partial.mkdir()
    _save_state(partial / "state", leaves)
    atomic_files.write_json(partial / "model.json", manifest["geometry"])
    atomic_files.write_json(partial / "manifest.json", manifest)
    if dead:
      torch_write.save_safetensors(partial / _DEAD_FILE, dead)
    partial.rename(dest)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def _save_file(
  dest: pathlib.Path,
  leaves: Iterable[torch_write.Tensor],
  manifest: Mapping[str, Any],
  dead: Sequence[torch_write.Tensor],
) -> None:
  metadata = {
    "geometry": json_text.dumps(manifest["geometry"]),
    "manifest": json_text.dumps(manifest),
  }
  torch_write.save_safetensors(
    dest, [*leaves, *(tensor._replace(name=f"dead/{tensor.name}") for tensor in dead)], metadata
  )


def is_file(dest: str | os.PathLike) -> bool:
  """Returns whether a destination is a file instead of a folder, by its suffix."""
  return str(dest).endswith(".safetensors")


def save(
  dest: str | os.PathLike,
  leaves: Iterable[torch_write.Tensor],
  manifest: Mapping[str, Any],
  dead: Sequence[torch_write.Tensor] = (),
) -> None:
  """Writes a converted checkpoint.

  At most 64 MiB of leaves, or one larger leaf, and a copy of them are in memory at a time.

  Args:
    dest: new folder, or new file with the suffix .safetensors.
    leaves: all leaves, with names "params/...", "ema_params/..." or "extra/...".
    manifest: JSON values; "geometry" has the fields of MPlug.
    dead: tensors that never run, with their PyTorch names.

  Raises:
    OSError: it could not be written; nothing of it remains.
    ValueError: a leaf could not be made; nothing of the checkpoint remains.
  """
  files.require_local(dest, "a converted checkpoint")
  dest = pathlib.Path(dest)
  orbax_logging.quiet()
  try:
    dest.parent.mkdir(parents=True, exist_ok=True)
    (_save_file if is_file(dest) else _save_folder)(dest, leaves, manifest, dead)
  except _NotMade as error:
    raise error.error from None
  except (OSError, ValueError) as error:  # tensorstore raises ValueError if writing fails
    if is_file(dest) and isinstance(error, ValueError):
      raise  # a leaf could not be made
    raise not_written(dest, error) from error


def not_written(dest: str | os.PathLike, error: BaseException) -> OSError:
  """Returns an OSError with a one-sentence message for a failure to write."""
  return OSError(
    f"{dest} could not be written ({errors_lib.reason(error)}), and nothing of it remains; "
    "make room or choose another destination."
  )


def read_description(path: str | os.PathLike) -> tuple[Geometry, dict[str, Any]] | None:
  """Reads the fields of MPlug and the manifest of a converted folder or file.

  Returns:
    (fields of MPlug, manifest); None if `path` is any other folder.

  Raises:
    ValueError: `path` is any other file, or one of the texts is not a JSON object.
  """
  checkpoint = files.open_path(path)
  if checkpoint.is_file():
    with reading.open_file(path) as file:
      texts = file.metadata.get("geometry", ""), file.metadata.get("manifest", "")
  elif (checkpoint / "model.json").exists():
    texts = (checkpoint / "model.json").read_text(), (checkpoint / "manifest.json").read_text()
  else:
    return None
  try:
    geometry, manifest = map(json.loads, texts)
    return dict(geometry), dict(manifest)
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"{path}: its model description or manifest is not a JSON object ({error}); "
      "convert the weights again."
    ) from error


@contextlib.contextmanager
def open_dead(
  path: str | os.PathLike,
) -> Iterator[dict[str, Callable[[], np.ndarray]]]:
  """Opens the kept tensors that never run, as {PyTorch name: function () -> array}."""
  checkpoint = files.open_path(path)
  file, prefix = (checkpoint, "dead/") if checkpoint.is_file() else (checkpoint / _DEAD_FILE, "")
  if not file.exists():
    yield {}
    return
  with open.open_tensors(file) as tensors:
    yield {
      name.removeprefix(prefix): functools.partial(tensors.__getitem__, name)
      for name in tensors
      if name.startswith(prefix)
    }
