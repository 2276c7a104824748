"""Reads parameters and extra data of checkpoints and converted folders."""

import functools
import os

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from mplug_jax.checkpoints import orbax_logging
from mplug_jax.checkpoints.errors import CheckpointError, reason
from mplug_jax.checkpoints.manager import DIRECTORY
from mplug_jax.checkpoints.shapes import Mismatch, check_shapes, saved_shapes, tree_shapes
from mplug_jax.tensor_files import open, tensor_file

# ---- parameters alone


def _state_dir(path, step: int | None) -> epath.Path:
  """Where the arrays of a run directory, checkpoint directory or bare Orbax directory are."""
  path = epath.Path(path).absolute()
  if not path.exists():
    raise FileNotFoundError(f"No such checkpoint or run directory: {path}.")
  for parent in (p for p in (path / DIRECTORY, path) if p.exists()):
    steps = sorted(found.step for found in ocp.path.step.standard_name_format().find_all(parent))
    if steps and step not in (None, *steps):
      raise FileNotFoundError(f"No checkpoint {step} in {parent}; there are {steps}.")
    if steps:
      return parent / str(steps[-1] if step is None else step) / "state"
  for candidate in (path / "state", path):
    if (candidate / "_METADATA").exists():
      return candidate
  raise FileNotFoundError(f"{path} is neither a run directory with checkpoints nor a checkpoint.")


def open_file(path) -> tensor_file.TensorFile:
  """A converted checkpoint in one file. Raises ValueError for any other file."""
  file = open.open_tensors(path)
  if "geometry" not in file.metadata:
    file.close()
    raise ValueError(
      f"{path} holds PyTorch weights; make a checkpoint of it with tools.convert_checkpoint and "
      f"name that."
    )
  return file


def array_shapes(path, step: int | None = None) -> dict[str, tuple[int, ...]]:
  """{"params/text_encoder/...": shape} of all that a checkpoint holds.

  Arguments and errors: see `load_params`.
  """
  if os.path.isfile(path):
    with open_file(path) as file:
      return {name: file.shape(name) for name in file}
  orbax_logging.quiet()
  state_dir = _state_dir(path, step)
  try:
    return saved_shapes(state_dir)
  except Exception as error:
    raise CheckpointError(f"{state_dir} cannot be read ({reason(error)}).") from error


def load_params(path, abstract_params, which: str = "params", step: int | None = None):
  """Reads the parameters of a checkpoint and nothing else.

  Args:
    path: run directory, its `checkpoints` directory, one checkpoint in it, a directory written
      by Orbax from {which: parameters}, or a safetensors file of tools.convert_checkpoint.
    abstract_params: pytree of jax.ShapeDtypeStruct with shardings; values are cast to its dtypes.
    which: "params" or "ema_params".
    step: which checkpoint of a run directory; None for the newest.

  Returns:
    The parameters, placed as `abstract_params` says.

  Raises:
    FileNotFoundError: no checkpoint there.
    ValueError: leaves missing, unexpected or of another shape, counted by group; a file that is no
      such checkpoint.
    CheckpointError: the checkpoint cannot be read.
  """
  if os.path.isfile(path):
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


def _check_params(target, shapes, where) -> None:
  """Raises Mismatch unless the one tree of `target`, {which: parameters}, is among `shapes` of all leaves."""
  (which,) = target
  saved = {name: shape for name, shape in shapes.items() if name.startswith(which + "/")}
  if not saved:
    raise Mismatch(f"{where} holds no {which}.")
  check_shapes(tree_shapes(target), saved, where)


def _load_params_of_file(path, abstract_params, which):
  with open_file(path) as file:
    _check_params({which: abstract_params}, {name: file.shape(name) for name in file}, path)
    return jax.tree_util.tree_map_with_path(
      lambda keys, like: placed(
        file[f"{which}/{jax.tree_util.keystr(keys, simple=True, separator='/')}"], like
      ),
      abstract_params,
    )


def placed(array: np.ndarray, like) -> jax.Array:
  """The whole array, which every process holds, with the dtype and sharding of `like`."""
  array = np.asarray(array, like.dtype)
  return jax.make_array_from_callback(array.shape, like.sharding, lambda index: array[index])


def load_arrays(path, which: str, step: int | None = None) -> dict[str, np.ndarray]:
  """Reads one tree of a checkpoint, whatever model it is of: {"text_encoder/layers/...": array}, {} if there is none.

  Args: `which` is "params", "ema_params", "extra", or a part such as "params/text_encoder"; others
    and errors: see `load_params`.
  """
  if os.path.isfile(path):
    with open_file(path) as file:
      return {
        name.removeprefix(which + "/"): file[name] for name in file if name.startswith(which + "/")
      }
  orbax_logging.quiet()
  state_dir, parts = _state_dir(path, step), which.split("/")
  try:
    tree = functools.reduce(
      lambda tree, part: tree.get(part) or {},
      parts,
      ocp.PyTreeCheckpointHandler().metadata(state_dir).tree,
    )
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    target = functools.reduce(lambda tree, part: {part: tree}, reversed(parts), target)
    restore_args = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray), target)
    items = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      found = checkpointer.restore(state_dir, args=items) if tree else {}
  except Exception as error:
    raise CheckpointError(f"{state_dir} cannot be read ({reason(error)}).") from error
  return {
    name.removeprefix(which + "/"): x
    for name, x in traverse_util.flatten_dict(found, sep="/").items()
  }


def load_extra(path, step: int | None = None) -> dict:
  """The `extra` that a checkpoint was saved with. Arguments and errors: see `load_params`."""
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
    return checkpointer.restore(_state_dir(path, step).parent / "data")
