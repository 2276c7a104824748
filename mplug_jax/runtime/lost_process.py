"""Names the lost process when one of several processes of a run dies.

JAX ends all processes when one is lost, but its message does not say what to do, and comes only
after the heartbeat timeout. A thread of each process therefore writes a sign of life to JAX's
key-value store every few seconds, reads those of the others, and prints which one is missing.
"""

import atexit
import contextlib
import os
import socket
import sys
import threading
import time
from typing import Any

import jax

_FOLDER = "mplug_jax/alive"
_END = "mplug_jax/end"
_INTERVAL = 2.0  # Seconds between two signs of life.
_PATIENCE = 25.0  # Seconds without one; JAX was seen to end a process after 34.
_ENDED = "ended"  # Sign of a process that ends in an orderly way.
_ADVICE = (
  "Start all processes again with the same command; the run resumes from its last checkpoint."
)


class Watch:
  """Signs of life of all processes of a run.

  The thread keeps writing while the main thread compiles or waits, so only a process that is
  stopped or gone gives no sign.
  """

  def __init__(
    self,
    client: Any,
    address: str,
    index: int,
    count: int,
    interval: float = _INTERVAL,
    patience: float = _PATIENCE,
  ):
    """Writes nothing yet.

    Args:
      client: JAX's client of the coordination service.
      address: "host:port" of the coordination service, which process 0 runs.
      index: number of this process.
      count: number of processes.
      interval: seconds between two signs of life.
      patience: seconds without a sign after which a process counts as lost.
    """
    self._client = client
    self._address = address
    self._index = index
    self._count = count
    self._interval = interval
    self._patience = patience
    self._number = 0
    self._signs: dict[int, tuple[str, float]] = {}  # {process: (last sign, when it came)}
    self._lost: set[int] = set()
    self._ends = threading.Event()
    self._lock = threading.Lock()
    self._thread: threading.Thread | None = None

  def start(self) -> None:
    """Starts the threads; the exit of this process in an orderly way ends them."""
    atexit.register(self.end)
    if self._index != 0:
      threading.Thread(target=self._watch_coordinator, name="coordinator", daemon=True).start()
    self._thread = threading.Thread(target=self._run, name="lost process", daemon=True)
    self._thread.start()

  def end(self) -> None:
    """Tells the others that this process ends in an orderly way, and ends the thread."""
    if self._ends.is_set():
      return
    self._ends.set()
    with contextlib.suppress(Exception):  # The coordinator may have ended already.
      self._write(_ENDED)
      self._client.key_value_set(f"{_END}/{self._index}", "")
    if self._thread:  # Must not wait inside JAX when the interpreter is torn down.
      self._thread.join(2 * self._interval)

  def wait_for_verdict(self) -> None:
    """Returns once each other process is known to be alive or lost.

    Called after an error of a collective operation, so a process counts as lost after four
    intervals. The coordinator waits longer, because the others cannot find out more without it.
    """
    began = time.monotonic()
    self._patience = min(self._patience, 4 * self._interval)
    limit = began + self._patience + 2 * self._interval
    while time.monotonic() < limit and not all(
      process in self._lost or sign == _ENDED or came > began
      for process, (sign, came) in list(self._signs.items())
    ):
      time.sleep(self._interval / 10)
    if self._index == 0:
      time.sleep(self._interval)

  @property
  def lost(self) -> list[int]:
    """Numbers of the processes that give no sign of life."""
    return sorted(self._lost)

  def _run(self):
    while not self._ends.is_set():
      try:
        self.beat()
        # Waits for the interval, or until `end`.
        self._client.blocking_key_value_get(f"{_END}/{self._index}", int(1000 * self._interval))
      except Exception as error:  # Its type is private.
        if "DEADLINE_EXCEEDED" not in str(error):
          return

  def _watch_coordinator(self):
    """Waits for the end of a connection to process 0; without it JAX aborts within a second."""
    host, _, port = self._address.rpartition(":")
    while not self._ends.is_set():
      try:
        connection = socket.create_connection((host.strip("[]"), int(port)), self._patience)
      except OSError:
        break
      with connection, contextlib.suppress(OSError):
        connection.settimeout(None)
        while connection.recv(4096):
          pass
      # The service itself closes unused connections; then the next one succeeds.
    if not self._ends.is_set():
      self._lost.add(0)
      _print(f"error: {self._name(0)}, which coordinates the run, was lost. {_ADVICE}")

  def beat(self) -> None:
    """Writes a sign of life, reads those of the others, and prints what changed."""
    self._number += 1
    self._write(f"{self._number} {socket.gethostname()}")
    now = time.monotonic()
    for key, sign in self._client.key_value_dir_get(_FOLDER):
      process = int(key.rpartition("/")[2])
      if process == self._index:
        continue
      before, came = self._signs.get(process, ("", now))
      if sign != before:
        self._signs[process] = (sign, now)
        if process in self._lost:
          self._lost.remove(process)
          _print(f"{self._name(process)} answers again.")
      elif sign != _ENDED and process not in self._lost and now - came > self._patience:
        self._lost.add(process)
        _print(
          f"warning: {self._name(process)} has not answered for {now - came:.0f} s and is probably "
          f"lost. {_ADVICE}"
        )

  def _write(self, sign):
    with self._lock:
      if self._ends.is_set() and sign != _ENDED:
        return
      self._client.key_value_set(f"{_FOLDER}/{self._index}", sign, allow_overwrite=True)

  def _name(self, process):
    host = self._signs.get(process, ("", 0.0))[0].partition(" ")[2]
    return f"process {process} of {self._count}" + (f" (on {host})" if host else "")


def _print(line: str) -> None:
  """Writes a line to stderr at once; print might wait for a lock of another thread."""
  os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{line}\n".encode())


_watches: list[Watch] = []


def start_watch() -> None:
  """Makes this process, one of several, print which other process is lost."""
  if not _watches:
    from jax._src import distributed  # The client has no public name.

    state = distributed.global_state
    if state.client is not None and state.coordinator_address:
      _watches.append(
        Watch(state.client, state.coordinator_address, jax.process_index(), jax.process_count())
      )
      _watches[0].start()


def leave_if_another_is_lost(error: BaseException | None) -> None:
  """Ends this process with status 1 if it is one of several and a collective operation failed.

  Usually another process is gone then; `Watch` prints which one. An orderly exit would wait for it
  for a minute, and abort.

  Args:
    error: exception that reached the top of the program.
  """
  cause = None
  while error is not None:
    if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
      cause = error
    error = error.__cause__ or error.__context__
  if cause is None or jax.process_count() == 1:
    return
  print(f"error: {str(cause).splitlines()[0]}", file=sys.stderr, flush=True)
  for watch in _watches:
    watch.wait_for_verdict()
    if not watch.lost:
      _print(f"error: a computation of all processes failed, though all answer. {_ADVICE}")
  os._exit(1)
