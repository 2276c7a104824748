"""The progress line of a run on the terminal."""

import collections
import math
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO


class Progress:
  """Step / total, loss, speed and time left: one rewritten line on a terminal, else plain lines.

  On a terminal the line is redrawn at most ten times a second; in a log a line is printed every
  `log_seconds`, and for the first and the last step.

  Attributes:
    mfu: what StepTimer.report says of it, shown once it is set.
  """

  _WINDOW = 30.0  # seconds over which the speed is averaged
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
    """Prints nothing yet. `stream` is stdout unless given; `clock` gives seconds."""
    self._total = total_steps
    self._enabled = enabled
    self._stream = stream or sys.stdout
    self._clock = clock
    self._is_terminal = self._stream.isatty()
    self._interval = self._REDRAW if self._is_terminal else log_seconds
    self._window: collections.deque[tuple[float, int]] = collections.deque()
    self._printed_at = -math.inf
    self._speed = self._loss = None
    self.mfu: float | None = None
    self._line_open = False

  def update(self, step: int, loss: float | None = None) -> None:
    """Says that `step` steps are done; `loss`, once given, is shown until the next one."""
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
    """Leaves the line, so that other output starts on a fresh one, and stops the speed's clock.

    To be called before an evaluation or a checkpoint, and at the end.
    """
    if self._line_open:
      self._stream.write("\n")
      self._stream.flush()
      self._line_open = False
    self._window.clear()

  def _print(self, step: int) -> None:
    if self._is_terminal:
      text = self._bar(step) + self._text(step)
      columns = max(shutil.get_terminal_size().columns - 1, 20)
      self._stream.write("\r" + text[:columns].ljust(columns))
      self._line_open = True
    else:
      self._stream.write(self._text(step) + "\n")
    self._stream.flush()

  def _bar(self, step: int, width: int = 24) -> str:
    filled = min(width, width * step // max(self._total, 1))
    return "[" + "#" * filled + "." * (width - filled) + "] "

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
