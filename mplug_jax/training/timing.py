"""Speed and time shares of the train loop; reduction of step metrics."""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np


def reduce_metrics(steps: Iterable[Mapping[str, tuple[Any, Any]]]) -> dict[str, float]:
  """Means over any number of steps, each of them {name: (sum, count)}.

  Sums and counts are added in float64 before the division, so that a step with more items weighs
  more. They may be arrays (one entry per device, say), which are added up. A name may be absent
  from some steps. A name whose count and sum are both 0 saw no item: it has no mean and is left
  out.
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
  """Speed of the train loop between two reports, with the time it waited for data, and that of the host's own work.

  with timer.data_wait():
    batch = next(batches)
  with timer.host():
    batch = prepare(batch)
  ...                        # the step
  timer.step()
  with timer.paused():       # evaluation, checkpoint: not part of the speed
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

    `examples_per_step` counts the global batch; `clock` gives seconds. `flops`: model operations of
    a step; `peak`:
    operations a second that all devices together could do, None where that is unknown.
    """
    self._examples = examples_per_step
    self._utilised = flops / peak if peak else None
    self._clock = clock
    self.reset()

  def reset(self) -> None:
    """Forgets what was timed, for example the first step, which compiles."""
    self._start = self._clock()
    self._steps = 0
    self._waited = self._hosted = self._paused = 0.0

  @contextlib.contextmanager
  def host(self):
    """Times the host's own work for a step: rewards, the way to the devices."""
    start = self._clock()
    yield
    self._hosted += self._clock() - start

  @contextlib.contextmanager
  def data_wait(self):
    """Times the wait for a batch."""
    start = self._clock()
    yield
    self._waited += self._clock() - start

  @contextlib.contextmanager
  def paused(self):
    """Takes what happens inside out of the timing; not to be nested with `data_wait`."""
    start = self._clock()
    yield
    self._paused += self._clock() - start

  def step(self) -> None:
    """Counts one step."""
    self._steps += 1

  def report(self) -> dict[str, float]:
    """Speed since the last report or reset, which it then starts again.

    Returns:
      steps_per_sec, examples_per_sec, data_wait_sec (the sum); shares of the elapsed time, in [0,
      1]: data_wait_share, host_share, and compute_share, the rest, in which the devices worked
      while nothing else kept them waiting; with a known peak also mfu, model FLOPs utilisation in
      [0, 1]. Empty when no step was counted.
    """
    elapsed = max(self._clock() - self._start - self._paused, 1e-9)
    steps, waited, hosted = self._steps, self._waited, self._hosted
    self.reset()
    if not steps:
      return {}
    utilisation = {} if self._utilised is None else {"mfu": self._utilised * steps / elapsed}
    return {
      "steps_per_sec": steps / elapsed,
      "examples_per_sec": steps * self._examples / elapsed,
      "data_wait_sec": waited,
      "data_wait_share": waited / elapsed,
      "host_share": hosted / elapsed,
      "compute_share": 1.0 - (waited + hosted) / elapsed,
      **utilisation,
    }
