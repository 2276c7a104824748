"""Stops a run on a signal, between two updates."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax


class Interrupt:
  """Context in which SIGTERM and Ctrl-C request a clean stop.

  A second Ctrl-C raises KeyboardInterrupt at once. With several processes JAX's own SIGTERM handler
  is kept (`checkpoints.manager.Manager.reached_preemption` reports it at a step that all processes
  agree on), and Ctrl-C is forwarded to it. Outside the main thread, the only one that receives
  signals, the context does nothing.

  Attributes:
    requested: whether a stop was requested; to be read once per step.
  """

  def __init__(self):
    self.requested = False
    self._interrupted = False
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "Interrupt":
    if threading.current_thread() is threading.main_thread():
      self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_interrupt)
      if jax.process_count() == 1:
        self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._on_terminate)
    return self

  def __exit__(self, *unused: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}

  def _on_terminate(self, number: int, frame: FrameType | None) -> None:
    self.requested = True

  def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
    if self._interrupted:
      raise KeyboardInterrupt
    self._interrupted = True
    if jax.process_count() == 1:
      self.requested = True
    else:
      os.kill(os.getpid(), signal.SIGTERM)
