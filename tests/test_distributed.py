"""Several processes on this machine train as one does.

Losses, gradients and predictions are equal; runs stop and resume together.
"""

import contextlib
import json
import signal
import socket

import jax
import pytest

from mplug_jax.checkpoints import manager as checkpoint
from mplug_jax.data.text import tokenizer as tokenizers
from mplug_jax.training import loop
from tests.support import tiny_run

STEPS = 4
SETTINGS = tiny_run.SETTINGS | {
  "total_steps": STEPS,
  "checkpoint.every": 2,
  "checkpoint.keep": STEPS,
}


def _config():
  c = tiny_run.config()
  c.update_from_flattened_dict(SETTINGS)
  return c


def _gradients(folder):
  """Returns the gradients of the first two updates, those of the first times b1, and added.

  Without clipping, the first moment after them is (1 - b1) times this sum.
  """
  c = _config()
  built = loop.build(
    c, tokenizers.load(folder / "tokenizer"), STEPS, 500, devices=jax.devices()[:1]
  )
  with contextlib.closing(checkpoint.Manager(folder)) as manager:
    state, _ = manager.restore(built.abstract, 2)
  return {name: x / (1 - c.optim.b1) for name, x in tiny_run.flat(state.opt_state.mu).items()}


@pytest.fixture(scope="module")
def alone(one_device, tmp_path_factory):
  """The run in this process on one device: its folder."""
  folder = tmp_path_factory.mktemp("alone")
  assert loop.train(_config(), str(folder)) == 0
  return folder


def _start(processes, workdir, devices, mesh, sleep=0.0):
  """So many processes with so many devices each; they find each other at a free port."""
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  settings = SETTINGS | dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh))
  return [
    tiny_run.start(
      workdir,
      settings,
      f"--coordinator=localhost:{port}",
      f"--processes={processes}",
      f"--process={i}",
      devices=devices,
      sleep=sleep,
    )
    for i in range(processes)
  ]


def _assert_same_as(alone, folder):
  ours, expected = tiny_run.lines(folder), tiny_run.lines(alone)
  assert (
    [row["step"] for row in ours]
    == [row["step"] for row in expected]
    == [*range(1, STEPS + 1), STEPS]
  )
  for row, other in zip(ours, expected):
    assert row.keys() == other.keys()
    for name, value in other.items():
      assert row[name] == pytest.approx(value, rel=1e-5), (row["step"], name)
  tiny_run.assert_gradients_equal(_gradients(folder), _gradients(alone))
  for name in ("predictions.json", "result.json"):
    assert json.loads((folder / name).read_text()) == json.loads((alone / name).read_text())


def test_two_processes_stop_together_go_on_and_equal_one(alone, tmp_path):
  """Parameters split over both processes (fsdp) and inside each (tensor).

  SIGTERM goes to the second process alone.
  """
  folder = tmp_path / "run"
  both = _start(2, folder, 2, (1, 2, 2), sleep=0.5)
  tiny_run.wait_for_lines(folder / "metrics.jsonl", 2, both[0])
  both[1].send_signal(signal.SIGTERM)
  first, second = map(tiny_run.finish, both)
  assert first[-1] == second[-1]
  assert first[-1].startswith("stopped at step ")
  assert 2 <= int(first[-1].split()[3].rstrip(";")) < STEPS
  assert any(line.startswith("devices: 4 cpu as data 1 x fsdp 2 x tensor 2") for line in first)
  # What belongs to the run is said once.
  assert not [line for line in second if line.startswith(("devices", "parameters", "step"))]

  first, second = map(tiny_run.finish, _start(2, folder, 2, (1, 2, 2)))
  assert first[-1].startswith("final: accuracy")
  assert not [line for line in second if line.startswith("final")]
  _assert_same_as(alone, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("processes", "mesh"), [(2, (8, 1, 1)), (2, (1, 8, 1)), (2, (2, 2, 2)), (4, (2, 2, 2))]
)
def test_processes_with_eight_devices_together_equal_one(processes, mesh, alone, tmp_path):
  for process in _start(processes, tmp_path / "run", 8 // processes, mesh):
    tiny_run.finish(process)
  _assert_same_as(alone, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 0])
def test_a_lost_process_ends_the_run(lost, tmp_path):
  """The survivor exits, not with 0, within twice the heartbeat timeout of 60 s.

  It names the lost process and says what to do.
  """
  both = _start(2, tmp_path, 1, (1, 2, 1), sleep=1.0)
  tiny_run.wait_for_lines(tmp_path / "metrics.jsonl", 2, both[0])
  both[lost].kill()
  _, err = both[1 - lost].communicate(timeout=120)
  assert both[1 - lost].returncode != 0
  (sentence,) = [line for line in err.splitlines() if f"process {lost} of 2 (on " in line]
  assert sentence.startswith("warning: " if lost else "error: ")
  assert "lost. Start all processes again with the same command" in sentence
