"""A sentence for the end that a process cannot announce itself.

When another process of a run is lost, JAX's coordination service aborts this one from a thread of
C++ (heartbeat timeout), which leaves a stack trace and no word of what to do. A child that does
nothing but wait says it then.
"""

import atexit
import os
import subprocess
import sys

import jax

# Ends with its parent. Interrupts of the terminal are for the parent alone. Other children of the
# parent may keep the pipe open.
_CHILD = """
import os, select, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
  signal.signal(number, signal.SIG_IGN)
while os.getppid() == int(sys.argv[1]):
  if select.select([0], [], [], 0.5)[0]:
    if os.read(0, 1):
      sys.exit()
    break
sys.stderr.write(sys.argv[2] + "\\n")
"""


def prepare(sentence):
  """From now on `sentence` goes to stderr if this process ends in any way that skips Python's exit handlers."""
  child = subprocess.Popen(
    [sys.executable, "-S", "-c", _CHILD, str(os.getpid()), sentence], stdin=subprocess.PIPE
  )

  def farewell():
    try:
      child.communicate(b"orderly")
    except OSError:
      pass  # it is gone already

  atexit.register(farewell)


def leave_if_another_is_lost(error):
  """Ends this process at once, with status 1, if there are several and `error` comes from what they do together.

  Mostly another process is gone then. An orderly exit would wait a minute for it, and abort.
  """
  cause = None
  while error is not None:
    cause = (
      error if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error) else cause
    )
    error = error.__cause__ or error.__context__
  if cause is not None and jax.process_count() > 1:
    print(f"error: {str(cause).splitlines()[0]}", file=sys.stderr, flush=True)
    os._exit(1)  # what `prepare` was given follows
