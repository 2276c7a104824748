"""Signs of life of the processes of a run, with a key-value store in this process."""

import inspect
import socket
import time

import pytest
from jax._src import distributed
from jaxlib import _jax

from mplug_jax.runtime import lost_process

_INTERVAL = 0.02
_PATIENCE = 0.5


class _Client:
  """The part of JAX's client that the watch uses; all clients share one dictionary."""

  def __init__(self, values):
    self.values = values

  def key_value_set(self, key, value, allow_overwrite=False):
    assert allow_overwrite or key not in self.values
    self.values[key] = value

  def key_value_dir_get(self, key):
    return [item for item in self.values.items() if item[0].startswith(f"{key}/")]

  def blocking_key_value_get(self, key, timeout_in_ms):
    time.sleep(timeout_in_ms / 1000)
    if key in self.values:
      return self.values[key]
    raise RuntimeError("DEADLINE_EXCEEDED: no value")


@pytest.fixture
def printed(monkeypatch):
  lines = []
  monkeypatch.setattr(lost_process, "_print", lines.append)
  return lines


def _watches(count, address="localhost:0"):
  values = {}
  return [
    lost_process.Watch(_Client(values), address, i, count, _INTERVAL, _PATIENCE)
    for i in range(count)
  ]


def _beat_for(watches, seconds):
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    for watch in watches:
      watch.beat()
    time.sleep(_INTERVAL)


def test_a_silent_process_is_named_once_and_may_answer_again(printed):
  watches = _watches(3)
  _beat_for(watches, _PATIENCE)
  assert printed == []
  _beat_for(watches[:1], 3 * _PATIENCE)
  assert len(printed) == 2
  assert printed[0].startswith("warning: process 1 of 3 (on ")
  assert "Start all processes again with the same command" in printed[0]
  assert printed[1].startswith("warning: process 2 of 3 (on ")
  assert watches[0].lost == [1, 2]
  _beat_for(watches[:2], _PATIENCE / 2)
  assert printed[2].startswith("process 1 of 3 ")
  assert printed[2].endswith("answers again.")
  assert watches[0].lost == [2]


def test_an_orderly_end_is_no_loss(printed):
  watches = _watches(2)
  _beat_for(watches, _PATIENCE)
  watches[1].end()
  _beat_for(watches[:1], 2 * _PATIENCE)
  assert printed == []
  watches[0].wait_for_verdict()
  assert watches[0].lost == []


def test_thread_names_the_lost_process_before_the_verdict(printed):
  watches = _watches(2)
  watches[1].beat()
  watches[0].start()
  time.sleep(2 * _INTERVAL)
  watches[0].wait_for_verdict()
  watches[0].end()
  assert len(printed) == 1
  assert "process 1 of 2" in printed[0]


def test_lost_coordinator_is_named(printed):
  service = socket.create_server(("localhost", 0))
  watches = _watches(2, f"localhost:{service.getsockname()[1]}")
  watches[0].beat()
  watches[1].beat()
  watches[1].start()
  unused = service.accept()[0]
  unused.close()  # As the service does with connections that send nothing.
  connection = service.accept()[0]
  assert printed == []
  service.close()
  connection.close()
  for _ in range(100):
    if printed:
      break
    time.sleep(_INTERVAL)
  watches[1].end()
  assert printed[0].startswith("error: process 0 of 2 (on ")
  assert "which coordinates the run, was lost" in printed[0]


def test_private_interface_of_jax():
  """The methods of JAX's client that `_Client` imitates."""
  assert hasattr(distributed.global_state, "client")
  assert hasattr(distributed.global_state, "coordinator_address")
  for name in ("key_value_set", "key_value_dir_get", "blocking_key_value_get"):
    documented = getattr(_jax.DistributedRuntimeClient, name).__doc__
    for parameter in list(inspect.signature(getattr(_Client, name)).parameters)[1:]:
      assert f"{parameter}:" in documented, name
