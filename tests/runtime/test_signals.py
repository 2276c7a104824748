"""Signals ask for a clean stop."""

import os
import signal

import pytest

from mplug_jax.runtime.signals import Interrupt


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupt_sets_a_flag_and_restores_handlers(number):
  before = signal.getsignal(number)
  with Interrupt() as interrupt:
    assert not interrupt.requested
    os.kill(os.getpid(), number)
    assert interrupt.requested
  assert signal.getsignal(number) == before


def test_second_ctrl_c_leaves_at_once():
  with Interrupt() as interrupt:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert interrupt.requested
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
