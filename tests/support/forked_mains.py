"""Runs `python -m mplug_jax.main` with many command lines, and imports what it needs once.

stdin: JSON list of lists of arguments. stdout: JSON list of [exit status, stdout, stderr, whether
JAX was imported], one for each.
"""

import contextlib
import json
import os
import runpy
import sys
import tempfile
import traceback

from absl import app, flags, logging  # noqa: F401 - what mplug_jax.main imports
from ml_collections import config_flags  # noqa: F401

from mplug_jax import config  # noqa: F401


def _child(arguments, files):
  """Runs main as a script with these arguments and ends the process, as the interpreter would."""
  for number, file in zip((1, 2), files):
    os.dup2(file.fileno(), number)
  sys.argv = ["main", *arguments]
  status = 0
  try:
    runpy.run_module("mplug_jax.main", run_name="__main__")
  except SystemExit as stop:
    status = stop.code or 0
  except BaseException:
    traceback.print_exc()
    status = 1
  sys.stdout.flush()
  sys.stderr.flush()
  files[2].write(str("jax" in sys.modules).encode())
  files[2].flush()
  os._exit(status)


def _run(arguments):
  """Returns [exit status, stdout, stderr, whether JAX was imported] of one command line."""
  with contextlib.ExitStack() as stack:
    files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
    pid = os.fork()
    if not pid:
      _child(arguments, files)
    _, status = os.waitpid(pid, 0)
    for file in files:
      file.seek(0)
    out, err, imported = (file.read().decode() for file in files)
  return os.waitstatus_to_exitcode(status), out, err, imported == "True"


if __name__ == "__main__":
  print(json.dumps([_run(arguments) for arguments in json.load(sys.stdin)]))
