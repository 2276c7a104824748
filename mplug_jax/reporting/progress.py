"""Progress of a run: a tqdm bar on a terminal, plain lines in a log."""

import collections
import math
import shutil
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
  import tqdm


class Progress:
  """Prints step / total, loss, speed and time left.

  On a terminal tqdm redraws one line at most ten times a second. In a log, where tqdm would write
  control characters, a plain line is printed every `log_seconds`, and for the first and the last
  step. The speed is measured here, because tqdm's includes evaluations and checkpoints.

  Attributes:
    mfu: model FLOP utilization as a fraction, shown once it is set.
  """

  _WINDOW = 30.0  # Seconds over which the speed is averaged.
  _REDRAW = 0.1

  def __init__(
    self,
    total_steps: int,
    *,
    enabled: bool = True,
    stream: TextIO | None = None,
    log_seconds: float = 30.0,
    clock: Callable[[], float] = time.perf_counter,
  ):
    """Prints nothing yet.

    Args:
      total_steps: steps of the whole run.
      enabled: False prints nothing.
      stream: where to print; None for stdout.
      log_seconds: seconds between two lines of a log.
      clock: function that returns seconds.
    """
    self._total = total_steps
    self._enabled = enabled
    self._stream = stream or sys.stdout
    self._clock = clock
    self._is_terminal = self._stream.isatty()
    self._interval = self._REDRAW if self._is_terminal else log_seconds
    self._window: collections.deque[tuple[float, int]] = collections.deque()
    self._printed_at = -math.inf
    self._speed: float | None = None
    self._loss: float | None = None
    self.mfu: float | None = None
    self._bar: tqdm.tqdm | None = None

  def update(self, step: int, loss: float | None = None) -> None:
    """Shows that steps are done.

    Args:
      step: number of finished steps.
      loss: shown until the next one is given.
    """
    if not self._enabled:
      return
    now = self._clock()
    self._loss = self._loss if loss is None else float(loss)
    self._window.append((now, step))
    while len(self._window) > 2 and self._window[1][0] <= now - self._WINDOW:
      self._window.popleft()
    first_time, first_step = self._window[0]
    if now > first_time:
      self._speed = (step - first_step) / (now - first_time)
    if now - self._printed_at >= self._interval or step >= self._total:
      self._printed_at = now
      self._print(step)

  def pause(self) -> None:
    """Ends the line, so that other output starts on a fresh one, and stops the speed's clock.

    Called before an evaluation or a checkpoint, and at the end.
    """
    if self._bar is not None:
      self._bar.close()
      self._bar = None
    self._window.clear()

  def _print(self, step: int) -> None:
    if not self._is_terminal:
      self._stream.write(self._text(step) + "\n")
      self._stream.flush()
      return
    columns = max(shutil.get_terminal_size().columns - 1, 20)
    if self._bar is None:
      import tqdm

      self._bar = tqdm.tqdm(
        total=self._total,
        initial=step,
        desc=self._text(step),
        file=self._stream,
        ascii=".#",
        bar_format="[{bar:24}] {desc}",
        ncols=columns,
        nrows=20,  # Terminals of unknown size would hide the bar.
        mininterval=0,
      )
    else:
      self._bar.ncols = columns  # The window may have another size now.
      self._bar.n = step
      self._bar.set_description_str(self._text(step))

  def _text(self, step: int) -> str:
    parts = [f"step {step:>{len(str(self._total))}}/{self._total}"]
    if self._loss is not None:
      parts.append(f"loss {self._loss:.4f}")
    if self._speed:
      slow = self._speed < 1
      parts.append(f"{1 / self._speed:.2f} s/step" if slow else f"{self._speed:.2f} steps/s")
      if self.mfu is not None:
        parts.append(f"MFU {100 * self.mfu:.1f}%")
      parts.append(f"{_duration((self._total - step) / self._speed)} left")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
  minutes, secs = divmod(max(0, round(seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
