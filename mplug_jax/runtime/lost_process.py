"""A sentence for the end that a process cannot announce itself.

When another process of a run is lost, JAX's coordination service aborts this one from a thread of
C++ (heartbeat timeout), which leaves a stack trace and no word of what to do. A child that does
nothing but wait says it then.
"""

import atexit
import contextlib
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


def prepare(sentence: str) -> None:
  """Prints a sentence on stderr when this process ends without running Python's exit handlers.

  Args:
    sentence: text to print.
  """
  child = subprocess.Popen(
    [sys.executable, "-S", "-c", _CHILD, str(os.getpid()), sentence], stdin=subprocess.PIPE
  )

  def farewell():
    with contextlib.suppress(OSError):  # The child may have ended already.
      child.communicate(b"orderly")

  atexit.register(farewell)


def leave_if_another_is_lost(error: BaseException | None) -> None:
  """Ends this process with status 1 if it is one of several and a collective operation failed.

  Usually another process is gone then. An orderly exit would wait a minute for it, and abort.

  Args:
    error: exception that reached the top of the program.
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
