"""Numbers of a run: (sum, count) metrics, the writer, the step timer and the progress line.

Knows numpy only. Device arrays are welcome wherever a number is, because numpy fetches them.

metrics.jsonl holds one json object per line: {"step": int, <name>: number, ...}. json has no NaN
and no infinity, so such a value is written as null and spelled out beside it:
{"step": 7, "loss": null, "non_finite": {"loss": "nan"}}. Texts and hyperparameters are lines of
the form {"step": int, "texts": {...}} and {"step": int, "hparams": {...}}.
"""

import collections
import contextlib
import importlib.util
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

import numpy as np
from absl import logging

from mplug_jax.runtime.atomic_files import write_atomic

_RESERVED = ("step", "texts", "hparams", "non_finite")


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


def read_metrics(path: str | os.PathLike) -> list[dict]:
  """The lines of a metrics.jsonl in their order; non-finite values are None.

  A line that is no json object with a step (the torn last line of a killed run) is skipped with a
  warning.

  Raises:
    FileNotFoundError: there is no such file.
  """
  if not os.path.exists(path):
    raise FileNotFoundError(f"{path}: no such metrics file; it is written by a training run.")
  rows = []
  with open(path, encoding="utf-8", errors="replace") as f:
    for number, line in enumerate(f, 1):
      try:
        row = json.loads(line)
        row["step"] += 0
        rows.append(row)
      except (ValueError, TypeError, KeyError):
        logging.warning("%s: line %d is not a metrics line, skipped.", path, number)
  return rows


class Writer:
  """Writes metrics.jsonl always, TensorBoard if asked for, and absl log lines at level INFO.

  Method names are those of clu.metric_writers. TensorBoard goes through tensorboardX, without
  TensorFlow; images go only there.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    enabled: bool = True,
    tensorboard: bool = False,
    resume_step: int | None = None,
  ):
    """Opens the files of `workdir`, which is created if necessary.

    Args:
      workdir: where metrics.jsonl and tensorboard/ live.
      enabled: False makes every method do nothing; only process 0 writes.
      tensorboard: also write TensorBoard event files; without tensorboardX a warning says so.
      resume_step: the step a training run continues from, 0 for a fresh one. Lines of later
        steps, which a lost run left behind, are dropped, so that no step stands twice. None (an
        evaluation of a finished run) keeps every line.
    """
    self._file = self._board = None
    self._step = resume_step or 0
    if not enabled:
      return
    os.makedirs(workdir, exist_ok=True)
    path = os.path.join(workdir, "metrics.jsonl")
    if os.path.exists(path):
      kept = [
        row for row in read_metrics(path) if resume_step is None or row["step"] <= resume_step
      ]
      write_atomic(path, b"".join(_json_line(row) for row in kept))
    self._file = open(path, "ab")
    if tensorboard and importlib.util.find_spec("tensorboardX") is None:
      logging.warning(
        "TensorBoard is asked for but tensorboardX is not installed: "
        "pip install tensorboardX. Metrics go to %s alone.",
        path,
      )
    elif tensorboard:
      import tensorboardX

      self._board = tensorboardX.SummaryWriter(
        os.path.join(workdir, "tensorboard"),
        purge_step=None if resume_step is None else resume_step + 1,
      )

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Writes {name: number}, the numbers being Python's, numpy's or arrays of one element.

    Raises:
      ValueError: a value is not one number, or a name is reserved.
    """
    if self._file is None:
      return
    numbers = {name: _number(name, value) for name, value in scalars.items()}
    self._write_line(_scalar_row(step, numbers))
    logging.info("[%d] %s", step, ", ".join(f"{k}={v:.6g}" for k, v in numbers.items()))
    if self._board is not None:
      for name, value in numbers.items():
        self._board.add_scalar(name, value, step)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes {name: u8[N, H, W, 3] or f32[N, H, W, 3] in [0, 1]} to TensorBoard, if it is on."""
    if self._board is not None:
      for name, image in images.items():
        self._board.add_images(name, np.asarray(image), step, dataformats="NHWC")

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes {name: text}, such as sample answers."""
    if self._file is None:
      return
    self._write_line({"step": int(step), "texts": dict(texts)})
    if self._board is not None:
      for name, text in texts.items():
        self._board.add_text(name, text, step)

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Records the hyperparameters that hold from the resume step on; nested ones are flattened."""
    if self._file is None:
      return
    flat = dict(_flatten(hparams))
    self._write_line({"step": self._step, "hparams": flat})
    if self._board is not None:
      self._board.add_text(
        "hparams", "\n".join(f"- `{k}`: {v}" for k, v in flat.items()), self._step
      )

  def flush(self) -> None:
    """Sends TensorBoard's buffered events to disk; metrics.jsonl is flushed line by line."""
    if self._board is not None:
      self._board.flush()

  def close(self) -> None:
    """Closes the files; a second call does nothing."""
    if self._board is not None:
      self._board.close()
    if self._file is not None:
      self._file.close()
    self._file = self._board = None

  def _write_line(self, row: dict) -> None:
    self._file.write(_json_line(row))
    self._file.flush()


def _json_line(row: Mapping) -> bytes:
  return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _number(name: str, value: Any) -> int | float:
  if name in _RESERVED:
    raise ValueError(f"metric name {name!r} is reserved, as are {', '.join(_RESERVED)}.")
  array = np.asarray(value)
  if array.size != 1 or array.dtype.kind in "OUS":
    raise ValueError(f"metric {name!r} is not one number: {value!r}.")
  number = array.item()
  return number if isinstance(number, int) else float(number)


def _scalar_row(step: int, numbers: Mapping[str, int | float]) -> dict:
  bad = {name: str(value) for name, value in numbers.items() if not math.isfinite(value)}
  row = {"step": int(step)} | {k: None if k in bad else v for k, v in numbers.items()}
  return row | ({"non_finite": bad} if bad else {})


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _flatten(value, f"{prefix}{key}.")
    else:
      plain = isinstance(value, (bool, int, str)) or value is None
      finite = isinstance(value, float) and math.isfinite(value)
      yield f"{prefix}{key}", value if plain or finite else str(value)


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
    """Starts timing. `examples_per_step` counts the global batch; `clock` gives seconds. `flops`: model operations of a step; `peak`:
    operations a second that all devices together could do, None where that is unknown."""
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
      steps_per_sec, examples_per_sec, data_wait_sec (the sum); shares of the elapsed time, in [0, 1]: data_wait_share,
      host_share, and compute_share, the rest, in which the devices worked while nothing else kept them waiting; with a known
      peak also mfu, model FLOPs utilisation in [0, 1]. Empty when no step was counted.
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
    self._speed = self._loss = self.mfu = None
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
