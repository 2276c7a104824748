"""Speed and time shares of the train loop; means of step metrics."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np


def reduce_metrics(steps: Iterable[Mapping[str, tuple[Any, Any]]]) -> dict[str, float]:
  """Returns the means of metrics over any number of steps.

  Sums and counts are added in float64 before the division, so that a step with more items has more
  weight.

  Args:
    steps: {name: (sum, count)} of each step, numbers or arrays whose entries are added. A name may
      be absent from some steps.

  Returns:
    {name: mean}, without names whose sum and count are both 0.
  """
  totals: dict[str, np.ndarray] = {}
  for metrics in steps:
    for name, pair in metrics.items():
      addend = np.array([np.sum(np.asarray(value, np.float64)) for value in pair])
      totals[name] = totals.get(name, 0.0) + addend
  with np.errstate(divide="ignore", invalid="ignore"):
    return {
      name: float(total / count)
      for name, (total, count) in totals.items()
      if count != 0 or total != 0
    }


class StepTimer:
  """Measures the speed of the train loop, the wait for data and the work of the host.

  Example:
    with timer.data_wait():
      batch = next(batches)
    with timer.host():
      batch = prepare(batch)
    state = step(state, batch)
    timer.step()
    with timer.paused():  # Evaluation and checkpoints do not count.
      evaluate()
  """

  def __init__(
    self,
    examples_per_step: int,
    clock: Callable[[], float] = time.perf_counter,
    flops: float = 0.0,
    peak: float | None = None,
  ):
    """Starts timing.

    Args:
      examples_per_step: rows of the global batch.
      clock: function that returns the time in seconds.
      flops: model operations of a step.
      peak: operations a second of all devices together, None if unknown.
    """
    self._examples = examples_per_step
    self._ideal_seconds = flops / peak if peak else None
    self._clock = clock
    self.reset()

  def reset(self) -> None:
    """Forgets the times so far, for example of the first step, which compiles."""
    self._start = self._clock()
    self._steps = 0
    self._waited = 0.0
    self._hosted = 0.0
    self._paused = 0.0

  @contextlib.contextmanager
  def host(self) -> Iterator[None]:
    """Times the work of the host for a step: rewards, transfer to the devices."""
    start = self._clock()
    yield
    self._hosted += self._clock() - start

  @contextlib.contextmanager
  def data_wait(self) -> Iterator[None]:
    """Times the wait for a batch."""
    start = self._clock()
    yield
    self._waited += self._clock() - start

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Excludes the block from the timing; not to be nested with `data_wait`."""
    start = self._clock()
    yield
    self._paused += self._clock() - start

  def step(self) -> None:
    """Counts one step."""
    self._steps += 1

  def report(self) -> dict[str, float]:
    """Returns the speed since the last report or reset, and resets.

    Returns:
      steps_per_sec, examples_per_sec, data_wait_sec (the sum); shares of the elapsed time, in [0,
      1]: data_wait_share, host_share, and compute_share, the rest, in which the devices compute;
      with a known peak also mfu, the model FLOPs utilization in [0, 1]. Empty without steps.
    """
    elapsed = max(self._clock() - self._start - self._paused, 1e-9)
    steps = self._steps
    waited = self._waited
    hosted = self._hosted
    self.reset()
    if not steps:
      return {}
    speed = {
      "steps_per_sec": steps / elapsed,
      "examples_per_sec": steps * self._examples / elapsed,
      "data_wait_sec": waited,
      "data_wait_share": waited / elapsed,
      "host_share": hosted / elapsed,
      "compute_share": 1.0 - (waited + hosted) / elapsed,
    }
    if self._ideal_seconds is not None:
      speed["mfu"] = self._ideal_seconds * steps / elapsed
    return speed
