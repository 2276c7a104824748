"""MetricLog: metrics, speed and progress of the train loop."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax

from mplug_jax.config import Config
from mplug_jax.flops import hardware, traced
from mplug_jax.reporting import metric_log
from mplug_jax.reporting import progress as progress_lib
from mplug_jax.runtime import files
from mplug_jax.training import timing
from mplug_jax.training.build import Build


class MetricLog:
  """Collects metrics of steps on the devices; writes and prints them every config.log_every steps.

  Attributes:
    timer: times of the loop's parts.
  """

  def __init__(
    self, config: Config, workdir: str, built: Build, total_steps: int, start: int, began: float
  ):
    """Opens metrics.jsonl.

    Args:
      config: config of the run.
      workdir: run folder.
      built: result of `build`.
      total_steps: steps of the whole run.
      start: step that this process starts at.
      began: time.perf_counter() when the process began.
    """
    self._config = config
    self._workdir = workdir
    self._schedules = built.schedules
    self._total_steps = total_steps
    self._start = start
    self._began = began
    self._primary = jax.process_index() == 0
    self._pending: list[Any] = []
    self._trace_folder = ""
    self._writer = metric_log.Writer(
      workdir, enabled=self._primary, tensorboard=config.tensorboard, resume_step=start
    )
    self._progress = progress_lib.Progress(total_steps, enabled=self._primary)
    peak = hardware.peak_flops(built.mesh.devices.flat[0].device_kind)
    self.timer = timing.StepTimer(
      config.batch_size,
      flops=traced.train_step_flops(built.task, config.batch_size) if peak else 0,
      peak=peak and peak * built.mesh.size,
    )

  def pause(self) -> None:
    """Ends the progress line, so that something else can be printed."""
    self._progress.pause()

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Ends the progress line and stops the clock for the block."""
    self.pause()
    with self.timer.paused():
      yield

  @contextlib.contextmanager
  def waiting_for_data(self) -> Iterator[None]:
    """Counts the block as waiting for data; ends the progress line if it raises."""
    try:
      with self.timer.data_wait():
        yield
    except Exception:
      self.pause()
      raise

  def evaluated(self, step: int, result: dict[str, float]) -> None:
    """Writes the metrics of an evaluation, and prints them unless it is the last one.

    Args:
      step: step that was evaluated.
      result: {metric: value}.
    """
    split = self._config.eval.split
    self._writer.write_scalars(step, {f"{split}/{name}": value for name, value in result.items()})
    if self._primary and step != self._total_steps:
      values = ", ".join(f"{name} {value:.2f}" for name, value in result.items())
      print(f"step {step}: {values}", flush=True)

  def profile_from(self, step: int) -> None:
    """Starts the profiler if config.profile_steps begins at this step.

    Args:
      step: number of steps so far.
    """
    first, last = self._config.profile_steps
    if max(self._start, first) == step < last:
      # The profiler writes to this machine's disk only.
      remote = files.is_remote(self._workdir)
      self._trace_folder = tempfile.mkdtemp() if remote else os.path.join(self._workdir, "profile")
      jax.profiler.start_trace(self._trace_folder)

  def stepped(self, step: int, metrics: Any, state: Any) -> None:
    """Adds the metrics of a step; writes and prints means when they are due.

    Args:
      step: number of steps before this one.
      metrics: {name: (sum, count)} on the devices.
      state: state after the step, awaited where a time or a trace ends.
    """
    self._pending.append(metrics)
    if step + 1 == self._config.profile_steps[1]:
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
      if files.is_remote(self._workdir):
        files.copy_folder(self._trace_folder, os.path.join(self._workdir, "profile"))
        files.remove_folder(self._trace_folder)
    if step == self._start:
      jax.block_until_ready(state)
      if self._primary:
        seconds = time.perf_counter() - self._began
        print(f"first step done {seconds:.1f} s after the start", flush=True)
      self.timer.reset()
    else:
      self.timer.step()
    self._progress.update(step + 1)
    if (step + 1) % self._config.log_every == 0 or step + 1 == self._total_steps:
      self._write(step)

  def _write(self, step: int) -> None:
    """Writes the means since the last call, learning rates and speed."""
    means = timing.reduce_metrics(jax.device_get(self._pending))
    self._pending = []
    rates = {f"lr_{name}": float(schedule(step)) for name, schedule in self._schedules.items()}
    speed = self.timer.report()
    values = {f"train/{name}": value for name, value in (means | rates | speed).items()}
    self._writer.write_scalars(step + 1, values)
    self._progress.mfu = speed.get("mfu")
    self._progress.update(step + 1, means["loss"])

  def flush(self) -> None:
    """Makes all lines written so far readable by others, also in an object store."""
    self._writer.flush()

  def close(self) -> None:
    """Closes the files and ends the progress line."""
    self._writer.close()
    self.pause()
