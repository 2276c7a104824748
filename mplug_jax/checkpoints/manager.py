"""Checkpoints on Orbax: saving, resuming, and reading parameters alone.

A run directory holds `checkpoints/<step>/` with the items `state` (arrays), `data` (JSON) and, when
a best metric is tracked, `metrics` (JSON).
"""

import errno
import functools
import logging
import math
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from mplug_jax.checkpoints import damage, orbax_logging
from mplug_jax.checkpoints.names import grouped
from mplug_jax.tensor_files import open

DIRECTORY = "checkpoints"


_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
  """A checkpoint could not be written or read; the message says which, why and what to do."""


class _Mismatch(ValueError):
  """The checkpoint is whole, but of another model or optimizer."""


def reason(error: BaseException) -> str:
  """The cause of a failed write, in the words of the operating system where they are found."""
  text = str(error)
  for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO):
    words = os.strerror(code)
    if words in text:
      return words
  return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else 'no message'}"


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  """{"params/temp/value": shape as stored}; a typed random key is stored as its integers."""
  shapes = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
      leaf = jax.eval_shape(jax.random.key_data, leaf)
    shapes[jax.tree_util.keystr(path, simple=True, separator="/")] = tuple(leaf.shape)
  return shapes


def _saved_shapes(state_dir: epath.Path) -> dict[str, tuple[int, ...]]:
  return _shapes(ocp.PyTreeCheckpointHandler().metadata(state_dir).tree)


def _check_shapes(wanted: dict, saved: dict, where) -> None:
  """Raises _Mismatch unless both hold the same leaves with the same shapes."""
  found = []
  if missing := wanted.keys() - saved.keys():
    found.append(f"{len(missing)} missing in the checkpoint: {grouped(missing)}")
  if unexpected := saved.keys() - wanted.keys():
    found.append(f"{len(unexpected)} in the checkpoint alone: {grouped(unexpected)}")
  if other := [
    path for path in sorted(wanted.keys() & saved.keys()) if saved[path] != wanted[path]
  ]:
    shapes = [f"{p} {saved[p]} in the checkpoint, {wanted[p]} wanted" for p in other[:5]]
    found.append(f"{len(other)} of another shape: {', '.join(shapes)}")
  if found:
    what = f"{where} does not fit this configuration (model, optimizer or EMA differ)"
    raise _Mismatch(f"{what}. {'; '.join(found)}.")


# ---- saving and resuming


class Manager:
  """Checkpoints of one run: the last `keep` and the best one.

  Every method is called by all processes alike. Leftovers of an interrupted save are removed when
  the manager starts.

  Args:
    workdir: run directory.
    keep: how many of the latest checkpoints stay.
    best_metric: name in `metrics` by which one more checkpoint stays, or None.
    best_mode: "max" or "min".
  """

  def __init__(
    self, workdir, *, keep: int = 1, best_metric: str | None = None, best_mode: str = "max"
  ):
    if keep < 1 or best_mode not in ("max", "min"):
      raise ValueError(f"keep must be at least 1 and best_mode max or min: {keep}, {best_mode!r}.")
    orbax_logging.quiet()
    self._directory = epath.Path(workdir).absolute() / DIRECTORY
    self._metric = best_metric
    self._pending = None
    self._remove_leftovers()
    self._sign = 1.0 if best_mode == "max" else -1.0
    policies = ocp.checkpoint_managers
    rank = {"get_metric_fn": self._quality, "keep_checkpoints_without_metrics": False}
    best = policies.BestN(n=int(best_metric is not None), **rank)
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
      best_fn=self._quality if best_metric is not None else None,
    )
    items = ("state", "data")
    self._manager = ocp.CheckpointManager(self._directory, options=options, item_names=items)

  def _quality(self, metrics: dict | None) -> float:
    """The metric, larger is better; -inf where it is absent or NaN."""
    value = (metrics or {}).get(self._metric, math.nan)
    return -math.inf if math.isnan(value) else self._sign * value

  def _remove_leftovers(self) -> None:
    """Deletes what interrupted saves left (Orbax's own option does it at some later time) and
    damaged metrics, without which Orbax opens the rest."""
    if jax.process_index() == 0 and self._directory.exists():
      for path in [*self._directory.iterdir(), *self._directory.glob("*/metrics/metrics")]:
        if path.is_dir() and ocp.utils.is_tmp_checkpoint(path):
          _log.warning("Removing %s, left by an interrupted save.", path)
          path.rmtree()
        elif path.is_file() and not damage.is_json(path):
          _log.warning("Removing %s, which cannot be read; the checkpoint stays.", path)
          path.unlink()
    multihost_utils.sync_global_devices("checkpoint: leftovers removed")

  def latest_step(self) -> int | None:
    """Step of the newest complete or pending checkpoint."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """Step of the checkpoint with the best metric; None if none carries it."""
    self.wait()
    step = self._manager.best_step() if self._metric is not None else None
    found = step is not None and self._quality(self._manager.metrics(step)) > -math.inf
    return step if found else None

  def save(self, step: int, state, extra: dict, metrics: dict | None = None) -> bool:
    """Starts saving; the arrays may be donated as soon as it returns.

    Args:
      step: number of updates done.
      state: pytree of arrays; bfloat16 and typed random keys included.
      extra: JSON values that belong to the state, such as the data position.
      metrics: {name: float} of the evaluation at this step.

    Returns:
      False if this step is already saved.

    Raises:
      CheckpointError: this or the previous save failed; older checkpoints remain.
    """
    self.wait()
    if step in self._manager.all_steps():
      return False
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(extra))
    if self._metric is not None:
      metrics = {name: float(value) for name, value in (metrics or {}).items()}
    self._pending = step
    self._run(self._manager.save, step, args=items, metrics=metrics)
    return True

  def wait(self) -> None:
    """Blocks until the pending save is on disk. Raises CheckpointError if it failed."""
    self._run(self._manager.wait_until_finished)
    self._pending = None

  def close(self) -> None:
    """Waits, then releases threads. Raises CheckpointError if the pending save failed."""
    self._run(self._manager.close)

  def _run(self, function, *args, **kwargs):
    """Calls Orbax; a failure becomes one sentence."""
    try:
      return function(*args, **kwargs)
    except Exception as error:
      step, self._pending = self._pending, None
      self._manager.reload()  # Orbax forgets older steps when a save starts, not when it succeeds.
      last = self._manager.latest_step()
      rest = "no complete checkpoint exists" if last is None else f"checkpoint {last} is complete"
      what = "The checkpoint" if step is None else f"Checkpoint {step}"
      raise CheckpointError(
        f"{what} could not be written to {self._directory} ({reason(error)}); {rest}. "
        "Make room or choose another workdir, then run the same command again to resume."
      ) from error

  def restore(self, abstract_state, step: int | None = None) -> tuple[Any, dict]:
    """Reads a checkpoint onto the devices that the abstract state names.

    Args:
      abstract_state: pytree of jax.ShapeDtypeStruct with shardings, of this run's mesh; values are
        cast to its dtypes.
      step: which checkpoint; None for the newest that can be read. Newer ones that cannot are
        reported and set aside as `unreadable-<step>`.

    Returns:
      (state, the `extra` dictionary it was saved with).

    Raises:
      FileNotFoundError: no such checkpoint.
      ValueError: the checkpoint belongs to another model or optimizer.
      CheckpointError: none can be read.
    """
    self.wait()
    steps = sorted((s for s in self._manager.all_steps() if step in (None, s)), reverse=True)
    if not steps:
      which = "checkpoint" if step is None else f"checkpoint {step}"
      raise FileNotFoundError(f"No {which} in {self._directory}.")
    arrays = ocp.args.StandardRestore(abstract_state)
    items = ocp.args.Composite(state=arrays, data=ocp.args.JsonRestore())
    failures = {}
    for s in steps:
      path = self._directory / str(s)
      try:
        _check_shapes(_shapes(abstract_state), _saved_shapes(path / "state"), f"Checkpoint {path}")
        damage.check_metadatas(path / "state")
        restored = self._manager.restore(s, args=items)
      except _Mismatch:
        raise
      except Exception as error:
        failures[s] = error
        continue
      self._set_aside(failures, used=s)
      return restored.state, restored.data
    newest, error = next(iter(failures.items()))
    what = f"None of {len(failures)} checkpoints in {self._directory} can be read"
    raise CheckpointError(f"{what}; {newest}, the newest: {reason(error)}.") from error

  def _set_aside(self, failures: dict, used: int) -> None:
    """Renames unreadable checkpoints, so that their steps can be saved again."""
    for step, error in failures.items():
      aside = self._directory / f"unreadable-{step}"
      words = "Checkpoint %d cannot be read (%s); using %d instead and moving it to %s."
      _log.warning(words, step, reason(error), used, aside)
      if jax.process_index() == 0:
        if aside.exists():
          aside.rmtree()
        (self._directory / str(step)).rename(aside)
    if failures:
      multihost_utils.sync_global_devices("checkpoint: unreadable set aside")
      self._manager.reload()

  def reached_preemption(self, step: int) -> bool:
    """True at the same step in every process once one got SIGTERM; a collective, every step.

    Always False in a single process: see `interrupt.Interrupt`.
    """
    return self._manager.reached_preemption(step)


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


def open_file(path) -> open.TensorFile:
  """A converted checkpoint in one file. Raises ValueError for any other file."""
  file = open.open_tensors(path)
  if "geometry" not in file.metadata:
    file.close()
    raise ValueError(
      f"{path} holds PyTorch weights; make a checkpoint of it with tools.convert_checkpoint and name that."
    )
  return file


def array_shapes(path, step: int | None = None) -> dict[str, tuple[int, ...]]:
  """{"params/text_encoder/...": shape} of all that a checkpoint holds. Arguments and errors: see `load_params`."""
  if os.path.isfile(path):
    with open_file(path) as file:
      return {name: file.shape(name) for name in file}
  orbax_logging.quiet()
  state_dir = _state_dir(path, step)
  try:
    return _saved_shapes(state_dir)
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
    ValueError: leaves missing, unexpected or of another shape, counted by group; a file that is no such checkpoint.
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
    _check_params(target, _saved_shapes(state_dir), state_dir)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      return checkpointer.restore(state_dir, args=items)[which]
  except _Mismatch:
    raise
  except Exception as error:
    raise CheckpointError(f"{state_dir} cannot be read ({reason(error)}).") from error


def _check_params(target, shapes, where) -> None:
  """Raises _Mismatch unless the one tree of `target`, {which: parameters}, is among `shapes` of all leaves."""
  (which,) = target
  saved = {name: shape for name, shape in shapes.items() if name.startswith(which + "/")}
  if not saved:
    raise _Mismatch(f"{where} holds no {which}.")
  _check_shapes(_shapes(target), saved, where)


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

  Args: `which` is "params", "ema_params", "extra", or a part such as "params/text_encoder"; others and errors: see `load_params`.
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
