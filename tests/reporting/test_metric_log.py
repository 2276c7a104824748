"""Metric reduction, the writer's files, the timer and the progress line."""

import io
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from absl import logging

from mplug_jax.reporting import metric_log
from mplug_jax.reporting import progress as progress_lib
from mplug_jax.training import timing
from tests.support import paths


class Clock:
  """A clock that the test sets."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def rows_of(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_reduction_weighs_by_count():
  steps = [
    {"loss": (6.0, 2), "accuracy": (np.float32(1), np.int32(4))},
    {"loss": (np.array([1.0, 2.0]), np.array([3, 5])), "rare": (0.0, 0)},
    {"rare": (np.float32(0.5), 1)},
  ]
  assert timing.reduce_metrics(steps) == {"loss": 0.9, "accuracy": 0.25, "rare": 0.5}


def test_reduction_keeps_float64_and_bad_values():
  many = [{"x": (np.float32(1.0), np.float32(1.0))}] * 4 + [{"x": (np.float32(2.0**24), 1)}] * 4
  assert timing.reduce_metrics(many)["x"] == (4 + 4 * 2.0**24) / 8
  out = timing.reduce_metrics([{"none": (0, 0), "bad": (np.nan, 3), "inf": (1.0, 0)}])
  assert set(out) == {"bad", "inf"}
  assert math.isnan(out["bad"])
  assert math.isinf(out["inf"])


def test_reduction_of_device_arrays():
  jnp = pytest.importorskip("jax.numpy")
  out = timing.reduce_metrics([{"x": (jnp.bfloat16(3), jnp.int32(2))}, {"x": (jnp.ones(2), 1)}])
  assert out == {"x": 5 / 3}


def test_writer_lines_are_on_disk_at_once(tmp_path):
  writer = metric_log.Writer(tmp_path / "run")
  writer.write_scalars(1, {"loss": np.float32(0.5), "epoch": 2, "one": np.ones((1, 1))})
  writer.write_texts(1, {"sample": "Quoi ? été\nline"})
  expected = [
    {"step": 1, "loss": 0.5, "epoch": 2, "one": 1.0},
    {"step": 1, "texts": {"sample": "Quoi ? été\nline"}},
  ]
  assert rows_of(tmp_path / "run") == expected  # before any flush or close
  writer.flush()
  writer.close()
  writer.close()
  assert rows_of(tmp_path / "run") == expected


def test_writer_spells_out_non_finite_values(tmp_path):
  writer = metric_log.Writer(tmp_path)
  writer.write_scalars(3, {"a": float("nan"), "b": -np.inf, "c": np.float32(np.inf), "d": 1})
  line = (tmp_path / "metrics.jsonl").read_text()
  row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no valid json"))
  assert row == {
    "step": 3,
    "a": None,
    "b": None,
    "c": None,
    "d": 1,
    "non_finite": {"a": "nan", "b": "-inf", "c": "inf"},
  }


def test_writer_hparams_are_flat_and_valid(tmp_path):
  writer = metric_log.Writer(tmp_path, resume_step=5)
  writer.write_hparams({"optim": {"lr": 1e-3, "clip": float("inf")}, "seed": 1, "betas": (0.9, 1)})
  assert rows_of(tmp_path) == [
    {"step": 5, "hparams": {"optim.lr": 1e-3, "optim.clip": "inf", "seed": 1, "betas": "(0.9, 1)"}}
  ]


def test_writer_resume_drops_later_and_torn_lines(tmp_path):
  writer = metric_log.Writer(tmp_path)
  for step in range(1, 7):
    writer.write_scalars(step, {"loss": 1.0 / step, "bad": np.nan})
  writer.close()
  kept = (tmp_path / "metrics.jsonl").read_text().splitlines()[:4]
  with open(tmp_path / "metrics.jsonl", "a") as f:
    f.write('{"step": 7, "lo')
  resumed = metric_log.Writer(tmp_path, resume_step=4)
  resumed.write_scalars(5, {"loss": 9.0})
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert lines[:4] == kept
  assert json.loads(lines[4]) == {"step": 5, "loss": 9.0}
  assert len(lines) == 5
  assert os.listdir(tmp_path) == ["metrics.jsonl"]
  metric_log.Writer(tmp_path)  # an evaluation afterwards
  assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines
  metric_log.Writer(tmp_path, resume_step=0)  # a run from the start
  assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_disabled_writer_writes_nothing(tmp_path):
  writer = metric_log.Writer(tmp_path / "run", enabled=False, tensorboard=True)
  writer.write_scalars(1, {"loss": 1.0})
  writer.write_images(1, {"x": np.zeros((1, 4, 4, 3), np.uint8)})
  writer.write_texts(1, {"x": "y"})
  writer.write_hparams({"a": 1})
  writer.flush()
  writer.close()
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
  ("scalars", "message"),
  [
    ({"loss": np.ones(2)}, "'loss' is not one number"),
    ({"loss": "low"}, "not one number"),
    ({"loss": None}, "not one number"),
    ({"step": 1.0}, "'step' is reserved"),
  ],
)
def test_writer_accepts_only_numbers(tmp_path, scalars, message):
  with pytest.raises(ValueError, match=message):
    metric_log.Writer(tmp_path).write_scalars(1, scalars)
  assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_writer_logs_at_info(tmp_path, caplog):
  before = logging.get_verbosity()
  logging.set_verbosity(logging.INFO)
  try:
    with caplog.at_level("INFO", logger="absl"):
      metric_log.Writer(tmp_path).write_scalars(12, {"loss": 0.123456789, "accuracy": 50})
  finally:
    logging.set_verbosity(before)
  assert "[12] loss=0.123457, accuracy=50" in caplog.text


def test_tensorboard_without_tensorflow(tmp_path):
  pytest.importorskip("tensorboardX")
  had_tensorflow = "tensorflow" in sys.modules  # by another test
  writer = metric_log.Writer(tmp_path, tensorboard=True)
  writer.write_scalars(1, {"loss": 0.5, "bad": np.nan})
  writer.write_images(1, {"sample": np.zeros((2, 8, 8, 3), np.uint8)})
  writer.write_texts(1, {"answers": "what? a circle"})
  writer.write_hparams({"optim": {"lr": 0.25}})
  writer.close()
  (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
  content = events.read_bytes()
  for part in (b"loss", b"sample", b"PNG", b"what? a circle", b"optim.lr"):
    assert part in content
  assert ("tensorflow" in sys.modules) == had_tensorflow


def test_tensorboard_missing_is_a_warning(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(metric_log.importlib.util, "find_spec", lambda name: None)
  writer = metric_log.Writer(tmp_path, tensorboard=True)
  assert "tensorboardX is not installed" in caplog.text
  writer.write_scalars(1, {"loss": 0.5})
  assert rows_of(tmp_path) == [{"step": 1, "loss": 0.5}]
  assert len(os.listdir(tmp_path)) == 1


def test_read_metrics_needs_a_file(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such metrics file"):
    metric_log.read_metrics(tmp_path / "metrics.jsonl")


def test_step_timer():
  clock = Clock()
  timer = timing.StepTimer(examples_per_step=32, clock=clock, flops=3e12, peak=6e12)
  clock.now += 7.0
  timer.reset()
  for _ in range(4):
    with timer.data_wait():
      clock.now += 0.5
    with timer.host():
      clock.now += 0.25
    clock.now += 1.25
    timer.step()
  with timer.paused():
    clock.now += 100.0
  assert timer.report() == pytest.approx(
    {
      "steps_per_sec": 0.5,
      "examples_per_sec": 16.0,
      "data_wait_sec": 2.0,
      "data_wait_share": 0.25,
      "host_share": 0.125,
      "compute_share": 0.625,
      "mfu": 0.25,
    }
  )
  clock.now += 3.0
  assert timer.report() == {}
  clock.now += 2.0
  timer.step()
  assert timer.report()["steps_per_sec"] == pytest.approx(0.5)
  timer = timing.StepTimer(1, clock=clock)
  timer.step()
  assert "mfu" not in timer.report()


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_in_a_log():
  clock = Clock()
  stream = io.StringIO()
  progress = progress_lib.Progress(1000, stream=stream, log_seconds=10, clock=clock)
  for step in range(1, 42):
    progress.update(step, loss=0.25 if step % 10 == 0 else None)
    clock.now += 0.5
    progress.mfu = None if step < 40 else 0.3125
  lines = stream.getvalue().splitlines()
  assert lines == [
    "step    1/1000",
    "step   21/1000  loss 0.2500  2.00 steps/s  8:10 left",
    "step   41/1000  loss 0.2500  2.00 steps/s  MFU 31.2%  8:00 left",
  ]
  assert "\r" not in stream.getvalue()


def test_progress_last_step_and_slow_steps():
  clock = Clock()
  stream = io.StringIO()
  progress = progress_lib.Progress(3, stream=stream, log_seconds=1e6, clock=clock)
  for step in (1, 2, 3):
    progress.update(step)
    clock.now += 4.0
  progress.pause()
  assert stream.getvalue().splitlines()[-1] == "step 3/3  4.00 s/step  0:00 left"


def test_progress_pause_is_not_counted():
  clock = Clock()
  stream = io.StringIO()
  progress = progress_lib.Progress(10_000, stream=stream, log_seconds=0, clock=clock)
  for step in range(1, 5):
    progress.update(step)
    clock.now += 1.0
  progress.pause()
  clock.now += 3600.0
  for step in (5, 6):
    progress.update(step)
    clock.now += 1.0
  last = stream.getvalue().splitlines()[-2:]
  assert all("1.00 steps/s  2:46:3" in line for line in last)


def test_progress_on_a_terminal(monkeypatch):
  monkeypatch.setenv("COLUMNS", "70")
  clock = Clock()
  stream = Terminal()
  progress = progress_lib.Progress(100, stream=stream, clock=clock)
  for step in range(1, 101):
    progress.update(step, loss=1.0)
    clock.now += 0.0625
  assert "\n" not in stream.getvalue()
  frames = stream.getvalue().split("\r")[1:]
  assert 48 <= len(frames) <= 52
  assert max(len(frame) for frame in frames) == 69
  assert frames[-1].startswith("[" + "#" * 24 + "] step 100/100  loss 1.0000  16.00 steps/s")
  progress.pause()
  progress.pause()
  assert stream.getvalue().endswith("\n")
  assert stream.getvalue().count("\n") == 1


def test_progress_disabled_is_silent():
  stream = io.StringIO()
  progress = progress_lib.Progress(10, enabled=False, stream=stream)
  progress.update(10, loss=1.0)
  progress.pause()
  assert stream.getvalue() == ""


def test_import_needs_no_jax():
  code = (
    "import sys; import mplug_jax.reporting.metric_log, mplug_jax.reporting.curves; "
    "print('jax' in sys.modules)"
  )
  root = paths.ROOT
  run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
  assert run.stdout.strip() == "False", run.stderr
