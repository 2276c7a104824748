"""Checkpoints on Orbax: saving, resuming, and reading parameters alone.

A run directory holds `checkpoints/<step>/` with the items `state` (arrays), `data` (JSON) and, when
a best metric is tracked, `metrics` (JSON).
"""

import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mplug_jax.checkpoints import damage, orbax_logging
from mplug_jax.checkpoints.errors import CheckpointError, reason
from mplug_jax.checkpoints.shapes import check_shapes, saved_shapes, tree_shapes
from mplug_jax.runtime import files

DIRECTORY = "checkpoints"

_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)


class Manager:
  """Checkpoints of one run: the last `keep` and the best one.

  Every method must be called by all processes. Leftovers of an interrupted save are removed when
  the manager starts.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    keep: int = 1,
    best_metric: str | None = None,
    best_mode: str = "max",
  ):
    """Opens the folder of checkpoints and removes leftovers of interrupted saves.

    Args:
      workdir: run directory.
      keep: number of the latest checkpoints to keep.
      best_metric: name in `metrics` by which one more checkpoint is kept, or None.
      best_mode: "max" or "min".

    Raises:
      ValueError: `keep` is below 1, `best_mode` has another value, or Orbax cannot write there.
    """
    if keep < 1 or best_mode not in ("max", "min"):
      raise ValueError(f"keep must be at least 1 and best_mode max or min: {keep}, {best_mode!r}.")
    orbax_logging.quiet()
    if files.is_remote(workdir) and not os.fspath(workdir).startswith("gs://"):
      raise ValueError(
        f"{workdir}: checkpoints can be written to a local folder or to gs:// only; choose another "
        "workdir."
      )
    self._directory = files.absolute(workdir) / DIRECTORY
    self._metric = best_metric
    self._pending: int | None = None
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

  def _quality(self, metrics: Mapping[str, float] | None) -> float:
    """Returns the metric, larger is better; -inf where it is absent or NaN."""
    if metrics is None or self._metric is None:
      return -math.inf
    value = metrics.get(self._metric, math.nan)
    return -math.inf if math.isnan(value) else self._sign * value

  def _remove_leftovers(self) -> None:
    """Deletes leftovers of interrupted saves, and damaged metrics, with which Orbax opens nothing.

    Orbax's own option deletes leftovers at some later time.
    """
    if jax.process_index() == 0 and self._directory.exists():
      for path in [*self._directory.iterdir(), *self._directory.glob("*/metrics/metrics")]:
        if path.is_dir() and ocp.utils.is_tmp_checkpoint(path):
          _log.warning("Removing %s, left by an interrupted save.", path)
          files.remove_folder(path)
        elif path.is_file() and not damage.is_json(path):
          _log.warning("Removing %s, which cannot be read; the checkpoint stays.", path)
          path.unlink()
    multihost_utils.sync_global_devices("checkpoint: leftovers removed")

  def latest_step(self) -> int | None:
    """Returns the step of the newest complete or pending checkpoint, or None."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """Returns the step of the checkpoint with the best metric; None if no checkpoint has it."""
    self.wait()
    step = self._manager.best_step() if self._metric is not None else None
    if step is None or self._quality(self._manager.metrics(step)) == -math.inf:
      return None
    return step

  def save(
    self,
    step: int,
    state: Any,
    extra: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> bool:
    """Starts a save; the arrays may be donated as soon as this returns.

    Args:
      step: number of updates done.
      state: pytree of arrays; bfloat16 arrays and typed random keys are allowed.
      extra: JSON values that belong to the state, such as the data position.
      metrics: {name: value} of the evaluation at this step.

    Returns:
      False if this step was saved before, else True.

    Raises:
      CheckpointError: this or the previous save failed; older checkpoints remain.
    """
    self.wait()
    if step in self._manager.all_steps():
      return False
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(extra))
    if self._metric is not None:
      numbers = {name: float(value) for name, value in (metrics or {}).items()}
      # Orbax would write the tokens NaN and Infinity, which are no JSON.
      metrics = {name: value for name, value in numbers.items() if math.isfinite(value)}
    self._pending = step
    self._run(self._manager.save, step, args=items, metrics=metrics)
    return True

  def wait(self) -> None:
    """Blocks until the pending save is on disk; raises CheckpointError if it failed."""
    self._run(self._manager.wait_until_finished)
    self._pending = None

  def close(self) -> None:
    """Waits, then releases threads; raises CheckpointError if the pending save failed."""
    self._run(self._manager.close)

  def _run(self, function: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
    """Calls Orbax; raises CheckpointError with a sentence if it fails."""
    try:
      return function(*args, **kwargs)
    except Exception as error:
      step, self._pending = self._pending, None
      self._manager.reload()  # Orbax forgets older steps when a save starts, not when it succeeds.
      last = self._manager.latest_step()
      rest = "no complete checkpoint exists" if last is None else f"checkpoint {last} is complete"
      subject = "The checkpoint" if step is None else f"Checkpoint {step}"
      raise CheckpointError(
        f"{subject} could not be written to {self._directory} ({reason(error)}); {rest}. "
        "Make room or choose another workdir, then run the same command again to resume."
      ) from error

  def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Reads a checkpoint onto the devices of the abstract state.

    Args:
      abstract_state: pytree of jax.ShapeDtypeStruct with shardings over this run's mesh; values
        are cast to its dtypes.
      step: step of the checkpoint; None for the newest that can be read. Newer ones that cannot be
        read are reported and renamed to `unreadable-<step>`.

    Returns:
      The state, and the `extra` dictionary that it was saved with.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: the checkpoint belongs to another model or optimizer.
      CheckpointError: none can be read.
    """
    self.wait()
    steps = sorted((s for s in self._manager.all_steps() if step in (None, s)), reverse=True)
    if not steps:
      missing = "checkpoint" if step is None else f"checkpoint {step}"
      raise FileNotFoundError(f"No {missing} in {self._directory}.")
    arrays = ocp.args.StandardRestore(abstract_state)
    items = ocp.args.Composite(state=arrays, data=ocp.args.JsonRestore())
    failures: dict[int, Exception] = {}
    for s in steps:
      path = self._directory / str(s)
      try:
        damage.check_metadatas(path / "state")
        restored = self._manager.restore(s, args=items)
      except Exception as error:
        self._check_fits(abstract_state, path)
        failures[s] = error
        continue
      self._set_aside(failures, used=s)
      return restored["state"], restored["data"]
    newest, error = next(iter(failures.items()))
    raise CheckpointError(
      f"None of {len(failures)} checkpoints in {self._directory} can be read; {newest}, the "
      f"newest: {reason(error)}."
    ) from error

  def _check_fits(self, abstract_state: Any, path: epath.Path) -> None:
    """Raises Mismatch if a checkpoint that Orbax refuses can be read, but is of another model."""
    try:
      saved = saved_shapes(path / "state")
    except Exception:  # damaged, which the caller reports
      return
    check_shapes(tree_shapes(abstract_state), saved, f"Checkpoint {path}")

  def _set_aside(self, failures: Mapping[int, Exception], used: int) -> None:
    """Renames unreadable checkpoints, so that their steps can be saved again."""
    for step, error in failures.items():
      aside = self._directory / f"unreadable-{step}"
      message = "Checkpoint %d cannot be read (%s); using %d instead and moving it to %s."
      _log.warning(message, step, reason(error), used, aside)
      if jax.process_index() == 0:
        if aside.exists():
          files.remove_folder(aside)
        (self._directory / str(step)).rename(aside)
    if failures:
      multihost_utils.sync_global_devices("checkpoint: unreadable set aside")
      self._manager.reload()

  def reached_preemption(self, step: int) -> bool:
    """Returns True at the same step in every process once one of them has received SIGTERM.

    A collective, to be called at every step. Always False in a single process, see
    `runtime.signals.Interrupt`.

    Args:
      step: number of updates done.
    """
    return self._manager.reached_preemption(step)
