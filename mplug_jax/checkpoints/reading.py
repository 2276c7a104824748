"""Reads parameters and extra data of checkpoints and converted folders."""

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from mplug_jax.checkpoints import orbax_logging
from mplug_jax.checkpoints.errors import CheckpointError, reason
from mplug_jax.checkpoints.manager import DIRECTORY
from mplug_jax.checkpoints.shapes import (
  Mismatch,
  check_shapes,
  saved_shapes,
  saved_tree,
  tree_shapes,
)
from mplug_jax.parallel.rules import path_name
from mplug_jax.runtime import files
from mplug_jax.tensor_files import open, tensor_file

_Path = str | os.PathLike[str]


def _state_dir(path: _Path, step: int | None) -> epath.Path:
  """Returns the folder of arrays in a run, checkpoint or bare Orbax directory."""
  path = epath.Path(files.absolute(path))
  if not path.exists():
    raise FileNotFoundError(f"No such checkpoint or run directory: {path}.")
  for parent in (p for p in (path / DIRECTORY, path) if p.exists()):
    steps = sorted(saved.step for saved in ocp.path.step.standard_name_format().find_all(parent))
    if steps and step not in (None, *steps):
      raise FileNotFoundError(f"No checkpoint {step} in {parent}; there are {steps}.")
    if steps:
      return parent / str(steps[-1] if step is None else step) / "state"
  for candidate in (path / "state", path):
    if (candidate / "_METADATA").exists():
      return candidate
  raise FileNotFoundError(f"{path} is neither a run directory with checkpoints nor a checkpoint.")


def open_file(path: _Path) -> tensor_file.TensorFile:
  """Opens a converted checkpoint in one file.

  Args:
    path: safetensors file of tools.convert_checkpoint.

  Raises:
    ValueError: the file is something else.
  """
  file = open.open_tensors(path)
  if "geometry" not in file.metadata:
    file.close()
    raise ValueError(
      f"{path} holds PyTorch weights; convert it with tools.convert_checkpoint and pass the result."
    )
  return file


def array_shapes(path: _Path, step: int | None = None) -> dict[str, tuple[int, ...]]:
  """Returns {"params/text_encoder/...": shape} of all arrays of a checkpoint.

  Args:
    path: see `load_params`.
    step: step of a checkpoint of a run directory; None for the newest.

  Raises:
    FileNotFoundError, ValueError, CheckpointError: see `load_params`.
  """
  if files.open_path(path).is_file():
    with open_file(path) as file:
      return {name: file.shape(name) for name in file}
  orbax_logging.quiet()
  state_dir = _state_dir(path, step)
  try:
    return saved_shapes(state_dir)
  except Exception as error:
    raise CheckpointError(f"{state_dir} cannot be read ({reason(error)}).") from error


def load_params(
  path: _Path, abstract_params: Any, which: str = "params", step: int | None = None
) -> Any:
  """Reads the parameters of a checkpoint and nothing else.

  Args:
    path: run directory, its `checkpoints` directory, one checkpoint in it, a directory written
      by Orbax from {which: parameters}, or a safetensors file of tools.convert_checkpoint.
    abstract_params: pytree of jax.ShapeDtypeStruct with shardings; values are cast to its dtypes.
    which: "params" or "ema_params".
    step: step of a checkpoint of a run directory; None for the newest.

  Returns:
    The parameters with the dtypes and shardings of `abstract_params`.

  Raises:
    FileNotFoundError: there is no checkpoint.
    ValueError: leaves are missing, unexpected or of another shape (counted by group), or the file
      is no converted checkpoint.
    CheckpointError: the checkpoint cannot be read.
  """
  if files.open_path(path).is_file():
    return _load_params_of_file(path, abstract_params, which)
  orbax_logging.quiet()
  state_dir = _state_dir(path, step)
  target = {which: abstract_params}
  restore_args = ocp.checkpoint_utils.construct_restore_args(target)
  items = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
  try:
    _check_params(target, saved_shapes(state_dir), state_dir)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      return checkpointer.restore(state_dir, args=items)[which]
  except Mismatch:
    raise
  except Exception as error:
    raise CheckpointError(f"{state_dir} cannot be read ({reason(error)}).") from error


def _check_params(
  target: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], title: _Path
) -> None:
  """Raises Mismatch unless `shapes` of all leaves contains those of {which: parameters}."""
  (which,) = target
  saved = {name: shape for name, shape in shapes.items() if name.startswith(which + "/")}
  if not saved:
    raise Mismatch(f"{title} holds no {which}.")
  check_shapes(tree_shapes(target), saved, title)


def _load_params_of_file(path: _Path, abstract_params: Any, which: str) -> Any:
  """Reads the parameters of a converted checkpoint in one file, see `load_params`."""
  with open_file(path) as file:
    _check_params({which: abstract_params}, {name: file.shape(name) for name in file}, path)
    return jax.tree.map_with_path(
      lambda keys, like: placed(file[f"{which}/{path_name(keys)}"], like), abstract_params
    )


def placed(array: np.ndarray, like: Any) -> jax.Array:
  """Returns a global array.

  Args:
    array: the whole array, which every process has.
    like: array or ShapeDtypeStruct with the dtype and sharding of the result.
  """
  array = np.asarray(array, like.dtype)
  return jax.make_array_from_callback(array.shape, like.sharding, lambda index: array[index])


def load_arrays(path: _Path, which: str, step: int | None = None) -> dict[str, np.ndarray]:
  """Reads one tree of a checkpoint of any model.

  Args:
    path: see `load_params`.
    which: "params", "ema_params", "extra", or a part such as "params/text_encoder".
    step: step of a checkpoint of a run directory; None for the newest.

  Returns:
    {"text_encoder/layers/...": array}; {} if the checkpoint has no such tree.

  Raises:
    FileNotFoundError, ValueError, CheckpointError: see `load_params`.
  """
  if files.open_path(path).is_file():
    with open_file(path) as file:
      return {
        name.removeprefix(which + "/"): file[name] for name in file if name.startswith(which + "/")
      }
  orbax_logging.quiet()
  state_dir = _state_dir(path, step)
  parts = which.split("/")
  try:
    tree = functools.reduce(lambda tree, part: tree.get(part) or {}, parts, saved_tree(state_dir))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    target = functools.reduce(lambda tree, part: {part: tree}, reversed(parts), target)
    restore_args = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray), target)
    items = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      restored = checkpointer.restore(state_dir, args=items) if tree else {}
  except Exception as error:
    raise CheckpointError(f"{state_dir} cannot be read ({reason(error)}).") from error
  arrays: dict[str, Any] = traverse_util.flatten_dict(restored, sep="/")
  return {name.removeprefix(which + "/"): array for name, array in arrays.items()}


def load_extra(path: _Path, step: int | None = None) -> dict[str, Any]:
  """Returns the `extra` dictionary that a checkpoint was saved with.

  Args:
    path: see `load_params`; not a single file.
    step: step of a checkpoint of a run directory; None for the newest.

  Raises:
    FileNotFoundError: there is no checkpoint.
  """
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
    return checkpointer.restore(_state_dir(path, step).parent / "data")
