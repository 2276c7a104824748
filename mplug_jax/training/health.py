"""HealthGuard: stops a run whose loss or gradient is not finite, and saves the last good state."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from mplug_jax.checkpoints.manager import Manager
from mplug_jax.data.text.tokenizer_base import Tokenizer
from mplug_jax.parallel import rules
from mplug_jax.training.state import TrainState


class StopTraining(RuntimeError):
  """Training cannot continue; the message says why and where the last good state is."""


class HealthGuard:
  """Saves checkpoints, and checks the health of the last step before anything relies on its state.

  Attributes:
    health: {"ok": bool[], "bad_leaf": i32[]} of the last step, on the devices; None before the
      first.
  """

  def __init__(self, manager: Manager, tokenizer: Tokenizer, workdir: str, start: int):
    """Stores the arguments.

    Args:
      manager: checkpoints of the run.
      tokenizer: its fingerprint is saved with the state.
      workdir: run folder, for messages.
      start: first step of this process's part of the run.
    """
    self.health: dict[str, jax.Array] | None = None
    self._manager = manager
    self._fingerprint = tokenizer.fingerprint
    self._workdir = workdir
    self._start = start

  def save(self, step: int, state: TrainState, result: dict[str, float] | None = None) -> None:
    """Saves the state.

    Args:
      step: number of the checkpoint.
      state: state after `step` steps.
      result: metrics of the evaluation at this step, if there was one.
    """
    self._manager.save(step, state, {"step": step, "tokenizer": self._fingerprint}, result or {})

  def check(self, state: TrainState) -> None:
    """Waits for the last step; if it was not finite, saves the state before it and stops.

    Args:
      state: state of the last step, which left it unchanged if it was not finite.

    Raises:
      StopTraining: a loss or gradient was not finite.
    """
    if self.health is None or bool(self.health["ok"]):
      return
    good = int(state.step)
    self.save(good, state)
    self._manager.close()
    raise StopTraining(
      f"Step {good + 1}: {bad_leaf_name(state.params, self.health)} is not finite, so training "
      f"stopped; the state after step {good} is saved in {self._workdir}. A smaller "
      "config.optim.lr, gradient clipping or float32 usually helps."
    )

  @contextlib.contextmanager
  def saving_on_error(self, step: int, state: TrainState) -> Iterator[None]:
    """Saves the state if the block raises, as reading a batch may.

    Args:
      step: number of the checkpoint.
      state: state after `step` steps.
    """
    try:
      yield
    except Exception:
      # Several processes do not fail at the same time, and saving takes all of them.
      if jax.process_count() == 1 and step > self._start:
        self.check(state)
        self.save(step, state)
      self._manager.close()
      raise


def bad_leaf_name(params: Any, health: dict[str, Any]) -> str:
  """Returns a phrase for the first gradient leaf that is not finite.

  Args:
    params: parameters, whose gradients have the same tree.
    health: {"bad_leaf": i32[]}, number of the leaf, or below 0 for the loss.
  """
  number = int(health["bad_leaf"])
  if number < 0:
    return "the loss"
  return "the gradient of " + rules.path_name(jax.tree.leaves_with_path(params)[number][0])
