"""Stopping on a signal, between two updates."""

import os
import signal
import threading

import jax


class Interrupt:
  """Context in which SIGTERM and Ctrl-C ask for a clean stop; read `requested` once per step.

  A second Ctrl-C raises KeyboardInterrupt at once. With several processes the runtime's own SIGTERM
  handler stays (`checkpoint.Manager.reached_preemption` reports it at a step that all agree on) and
  Ctrl-C is passed on to it. Outside the main thread, which alone gets signals, the context does
  nothing.
  """

  def __init__(self):
    self.requested = False
    self._interrupted = False
    self._previous = {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_interrupt)
      if jax.process_count() == 1:
        self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._on_terminate)
    return self

  def __exit__(self, *unused):
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}

  def _on_terminate(self, number, frame):
    self.requested = True

  def _on_interrupt(self, number, frame):
    if self._interrupted:
      raise KeyboardInterrupt
    self._interrupted = True
    if jax.process_count() == 1:
      self.requested = True
    else:
      os.kill(os.getpid(), signal.SIGTERM)
