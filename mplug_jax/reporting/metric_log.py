"""Reads and writes metrics.jsonl, the numbers of a run.

The file has one JSON object per line: {"step": int, <name>: number, ...}. JSON has no NaN and no
infinity, so such a value is written as null and named in the same line:
{"step": 7, "loss": null, "non_finite": {"loss": "nan"}}. Texts and hyperparameters are lines of
the form {"step": int, "texts": {...}} and {"step": int, "hparams": {...}}. Numbers may be device
arrays, which NumPy fetches.

Own code rather than clu.metric_writers, which needs TensorFlow and writes no lines that a resumed
run can cut.
"""

import importlib.util
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from absl import logging

from mplug_jax.runtime import files
from mplug_jax.runtime.atomic_files import write_atomic

_RESERVED = ("step", "texts", "hparams", "non_finite")


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Returns the lines of a metrics.jsonl in their order; non-finite values are None.

  A line that is no JSON object with a step (the torn last line of a killed run) is skipped with a
  warning.

  Args:
    path: the file.

  Raises:
    FileNotFoundError: there is no such file.
  """
  file = files.open_path(path)
  if not file.exists():
    raise FileNotFoundError(f"{path}: no such metrics file; it is written by a training run.")
  rows = []
  for number, line in enumerate(file.read_bytes().splitlines(), 1):
    try:
      row = json.loads(line.decode("utf-8", errors="replace"))
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
    workdir: str | os.PathLike[str],
    *,
    enabled: bool = True,
    tensorboard: bool = False,
    resume_step: int | None = None,
  ):
    """Opens the files of `workdir`, which is created if necessary.

    Args:
      workdir: folder of metrics.jsonl and tensorboard/.
      enabled: False turns all methods off; only process 0 writes.
      tensorboard: also writes TensorBoard event files; without tensorboardX it logs a warning.
      resume_step: step that a training run continues from, 0 for a new run. Lines of later steps,
        left by a lost run, are dropped, so that no step occurs twice. None (an evaluation of a
        finished run) keeps every line.
    """
    self._file = self._board = None
    self._step = resume_step or 0
    if not enabled:
      return
    files.make_folder(workdir)
    path = os.path.join(workdir, "metrics.jsonl")
    if files.open_path(path).exists():
      kept = [
        row for row in read_metrics(path) if resume_step is None or row["step"] <= resume_step
      ]
      write_atomic(path, b"".join(_json_line(row) for row in kept))
    self._file = files.LineFile(path)
    if tensorboard and importlib.util.find_spec("tensorboardX") is None:
      logging.warning(
        "tensorboardX is not installed, so metrics are only written to %s. For TensorBoard: "
        "pip install tensorboardX.",
        path,
      )
    elif tensorboard:
      import tensorboardX

      self._board = tensorboardX.SummaryWriter(
        os.path.join(workdir, "tensorboard"),
        purge_step=None if resume_step is None else resume_step + 1,
      )

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Writes numbers.

    Args:
      step: number of the step.
      scalars: {name: number of Python or NumPy, or array of one element}.

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
    """Writes images to TensorBoard, if it is on.

    Args:
      step: number of the step.
      images: {name: u8[N, H, W, 3] or f32[N, H, W, 3] in [0, 1]}.
    """
    if self._board is not None:
      for name, image in images.items():
        self._board.add_images(name, np.asarray(image), step, dataformats="NHWC")

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes texts, such as sample answers.

    Args:
      step: number of the step.
      texts: {name: text}.
    """
    if self._file is None:
      return
    self._write_line({"step": int(step), "texts": dict(texts)})
    if self._board is not None:
      for name, text in texts.items():
        self._board.add_text(name, text, step)

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes the hyperparameters that hold from the resume step on.

    Args:
      hparams: {name: value}; nested mappings are flattened.
    """
    if self._file is None:
      return
    flat = dict(_flatten(hparams))
    self._write_line({"step": self._step, "hparams": flat})
    if self._board is not None:
      self._board.add_text(
        "hparams", "\n".join(f"- `{k}`: {v}" for k, v in flat.items()), self._step
      )

  def flush(self) -> None:
    """Writes everything buffered: TensorBoard's events, and metrics.jsonl in an object store."""
    if self._file is not None:
      self._file.flush()
    if self._board is not None:
      self._board.flush()

  def close(self) -> None:
    """Closes the files; a second call does nothing."""
    if self._board is not None:
      self._board.close()
    if self._file is not None:
      self._file.close()
    self._file = self._board = None

  def _write_line(self, row: dict[str, Any]) -> None:
    assert self._file is not None
    self._file.write(_json_line(row))


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
