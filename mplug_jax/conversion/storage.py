"""Converted checkpoints on disk: a folder, or one safetensors file, written a few leaves at a time, as a whole or not at all.

Folder: state/ (Orbax: params, ema_params from momentum copies, extra with the queues), model.json (fields of MPlug), manifest.json,
and dead_weights.safetensors with the tensors that never run, on request. File: the same leaves as "params/text_encoder/...",
"ema_params/...", "extra/...", the tensors that never run as "dead/" and their PyTorch name, and the two texts in its metadata as
"geometry" and "manifest".
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from mplug_jax.checkpoints import errors as errors_lib
from mplug_jax.checkpoints import orbax_logging, reading
from mplug_jax.runtime import atomic_files
from mplug_jax.tensor_files import open
from mplug_jax.tensor_files import write as torch_write

_DEAD_FILE = "dead_weights.safetensors"
# Leaves that are written together: each waits for the disk once, which takes as long as some megabytes.
_BATCH_BYTES, _BATCH_LEAVES = 64 << 20, 32


class _NotMade(Exception):
  """What went wrong in making a leaf, on its way through Orbax; an error of writing is another thing."""


class _Leaf:
  """A torch_write.Tensor as a leaf of a tree, with what Orbax asks of arrays; JAX would take that tuple for a branch."""

  def __init__(self, tensor):
    self.shape, self.dtype, self.size = (
      tensor.shape,
      np.dtype(tensor.dtype),
      math.prod(tensor.shape),
    )
    self.nbytes, self._load = self.size * self.dtype.itemsize, tensor.load

  def make(self):
    try:
      return self._load()
    except Exception as error:
      raise _NotMade from error


class _LeafHandler(ocp.type_handlers.NumpyHandler):
  """Makes a few leaves, writes them, makes the next; Orbax's own handlers copy all leaves before they write the first.

  What it writes is read as any numpy array.
  """

  async def serialize(self, values, infos, args=None):
    write_one = super().serialize
    for batch in _batches(zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True)):
      arrays = [value.make() for value, _, _ in batch]
      # A call for each: the writes of one call are abandoned, but not ended, when one of them fails.
      writes = [
        write
        for array, (_, info, arg) in zip(arrays, batch, strict=True)
        for write in await write_one([array], [info], [arg])
      ]
      if errors := [error for write in writes if (error := _failure(write))]:
        raise errors[0]
    return []


def _failure(write):
  """Waits for a write -> its error, None if it succeeded."""
  try:
    write.result()
  except Exception as error:
    return error


def _batches(leaves):
  """Tuples that a _Leaf begins -> lists of them, small enough to be in memory and under way together."""
  batch, size = [], 0
  for leaf in leaves:
    if batch and (size + leaf[0].nbytes > _BATCH_BYTES or len(batch) == _BATCH_LEAVES):
      yield batch
      batch, size = [], 0
    batch.append(leaf)
    size += leaf[0].nbytes
  yield batch


def _save_state(path, leaves):
  tree = traverse_util.unflatten_dict({leaf.name: _Leaf(leaf) for leaf in leaves}, sep="/")
  # Orbax warns about a registry without jax.Array, though the tree has none.
  registry = ocp.type_handlers.create_type_handler_registry(
    (_Leaf, _LeafHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
  )
  # Compressing takes longer than writing, and saves a tenth of trained float32 numbers.
  handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(path, args=ocp.args.PyTreeSave(tree))


def _save_folder(dest, leaves, manifest, dead):
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


def _save_file(dest, leaves, manifest, dead):
  metadata = {"geometry": json.dumps(manifest["geometry"]), "manifest": json.dumps(manifest)}
  torch_write.save_safetensors(
    dest, [*leaves, *(tensor._replace(name=f"dead/{tensor.name}") for tensor in dead)], metadata
  )


def is_file(dest):
  """Whether a destination's name asks for one file instead of a folder."""
  return str(dest).endswith(".safetensors")


def save(dest, leaves, manifest, dead=()):
  """Writes a converted checkpoint; 64 MiB of leaves, or one, and a copy of them are in memory at a time.

  Args:
    dest: new folder, or new file with the ending .safetensors.
    leaves: torch_write.Tensor of every leaf, called "params/...", "ema_params/..." or "extra/...".
    manifest: JSON values; "geometry" are the fields of MPlug.
    dead: torch_write.Tensor of what never runs, by PyTorch names.

  Raises:
    OSError: it could not be written; nothing of it remains.
    ValueError: a leaf could not be made; nothing remains either.
  """
  dest = pathlib.Path(dest)
  orbax_logging.quiet()
  try:
    dest.parent.mkdir(parents=True, exist_ok=True)
    (_save_file if is_file(dest) else _save_folder)(dest, leaves, manifest, dead)
  except _NotMade as error:
    raise error.__cause__ from None
  except (OSError, ValueError) as error:  # tensorstore's errors of writing are ValueErrors
    if is_file(dest) and isinstance(error, ValueError):
      raise  # of a leaf
    raise not_written(dest, error) from error


def not_written(dest, error):
  """A failure to write -> OSError of one sentence."""
  return OSError(
    f"{dest} could not be written ({errors_lib.reason(error)}), and nothing of it remains; "
    "make room or choose another destination."
  )


def read_description(path):
  """Converted folder or file -> (fields of MPlug, manifest); None if `path` is a folder of another kind.

  Raises:
    ValueError: another file, or a text in it that is no JSON.
  """
  path = pathlib.Path(path)
  if path.is_file():
    with reading.open_file(path) as file:
      texts = file.metadata.get("geometry", ""), file.metadata.get("manifest", "")
  elif (path / "model.json").exists():
    texts = (path / "model.json").read_text(), (path / "manifest.json").read_text()
  else:
    return None
  try:
    geometry, manifest = map(json.loads, texts)
    return dict(geometry), dict(manifest)
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"{path}: its model description or manifest is no JSON object ({error}); convert the weights again."
    ) from error


@contextlib.contextmanager
def open_dead(path):
  """{PyTorch name: function () -> array} of the tensors that never run and were kept."""
  path = pathlib.Path(path)
  file, prefix = (path, "dead/") if path.is_file() else (path / _DEAD_FILE, "")
  if not file.exists():
    yield {}
    return
  with open.open_tensors(file) as tensors:
    yield {
      name.removeprefix(prefix): functools.partial(tensors.__getitem__, name)
      for name in tensors
      if name.startswith(prefix)
    }
