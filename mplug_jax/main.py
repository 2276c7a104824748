"""Command line: `python -m mplug_jax.main --config=configs/vqa.py [--workdir=DIR] [--mode=train|evaluate]`."""

import os
import re
import sys
import warnings

from absl import app, flags, logging
from ml_collections import config_flags

from mplug_jax import config as config_lib

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file of configs/, with an argument behind a colon.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; default: runs/<config name>.")
_MODE = flags.DEFINE_enum(
  "mode", "train", ["train", "evaluate"], "Train and evaluate, or evaluate a checkpoint alone."
)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", "", "Run folder whose weights --mode=evaluate reads; default: the workdir."
)
_PRINT_CONFIG = flags.DEFINE_bool(
  "print_config", False, "Print the resolved config as JSON and exit; nothing is computed."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", "", "host:port of process 0; needed only where JAX cannot find out itself."
)
_PROCESSES = flags.DEFINE_integer("processes", 0, "Number of processes, with --coordinator.")
_PROCESS = flags.DEFINE_integer("process", 0, "Number of this process, with --coordinator.")


def _start_distributed():
  """Joins the other processes of the run, when there are any."""
  import jax

  if _COORDINATOR.value:
    jax.distributed.initialize(
      _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, heartbeat_timeout_seconds=60
    )
  elif (
    "TPU_WORKER_HOSTNAMES" in os.environ
    and "," in os.environ["TPU_WORKER_HOSTNAMES"]
    or "SLURM_NTASKS" in os.environ
  ):
    jax.distributed.initialize(heartbeat_timeout_seconds=60)


def _refuse(message):
  """One sentence on stderr, status 1."""
  print(f"error: {message}", file=sys.stderr)
  sys.exit(1)


def _unknown_key(argv):
  """A sentence about the first --config.a.b of the command line that its config lacks, or None."""
  file = re.search(r"\0--?config[=\0]([^\0]*)", "\0".join(argv))
  config = flags.FLAGS["config"].parser.parse(file[1])
  for arg in argv:
    path = re.match(r"--?(config\.[^=]*)", arg)
    section, *keys = path[1].split(".") if path else [""]
    values = config
    for key in keys:
      if not hasattr(values, "keys"):
        return f"{arg}: {section} is a value and has no keys."
      if key not in values:
        return f"{arg}: {section} has no key {key!r}; it has {', '.join(sorted(values.keys()))}."
      section, values = f"{section}.{key}", values[key]
  return None


def _with_config_files(argv):
  """Replaces the name of a packaged config, as in --config=vqa:tiny, by its file.

  Raises:
    FileNotFoundError: there is neither such a file nor such a packaged config.
  """
  resolved = list(argv)
  for i, arg in enumerate(argv):
    flag, equals, value = arg.partition("=")
    if flag.lstrip("-") != "config" or not flag.startswith("-"):
      continue
    position = i if equals else i + 1
    if position == len(argv):
      continue
    name, colon, rest = (value if equals else argv[position]).partition(":")
    resolved[position] = (
      (f"{flag}=" if equals else "") + config_lib.config_file(name) + colon + rest
    )
  return resolved


def parse_flags(argv):
  """Parses the command line; returns what is left of it. Anything wrong with it, or with the config file, is one sentence."""
  try:
    argv = _with_config_files(argv)
  except FileNotFoundError as error:
    _refuse(error)
  try:
    rest = flags.FLAGS(argv)
    if CONFIG.value is None:
      _refuse(
        "--config=configs/vqa.py or another file of configs/ is needed; --help lists the flags."
      )
    CONFIG.value.name  # noqa: B018 - a file that could not be read raises here
  except flags.Error as error:
    cause = error
    while (
      "\n" in str(cause) and cause.__context__
    ):  # the message of a config's own error is wrapped in tracebacks
      cause = cause.__context__
    _refuse(cause)
  except OSError as error:
    _refuse(f"The config cannot be read: {str(error).splitlines()[-1].strip()}.")
  except (AttributeError, KeyError):
    if unknown := _unknown_key(argv):
      _refuse(unknown)
    raise
  if len(rest) > 1:
    _refuse(f"Unknown argument {rest[1]!r}; --help lists the flags.")
  return rest


def workdir(config):
  """The folder of the run that the flags describe."""
  return _WORKDIR.value or os.path.join("runs", config.name)


def _quiet_other_writes():
  """When a write fails, Orbax closes the event loop that its other writes report to, and drops them; one error is enough."""

  def hook(problem):
    if str(problem.exc_value) != "Event loop is closed":
      sys.__unraisablehook__(problem)

  sys.unraisablehook = hook
  warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def main(argv):
  """Runs what the parsed flags say. Exits with status 0 when it is done, 1 and one sentence on stderr when it cannot be."""
  del argv
  config = CONFIG.value
  if _PRINT_CONFIG.value:
    print(config_lib.to_json(config), end="")
    return
  folder = workdir(config)
  _start_distributed()
  from mplug_jax.checkpoints import errors
  from mplug_jax.runtime import lost_process
  from mplug_jax.training import evaluate, loop

  _quiet_other_writes()
  try:
    if _MODE.value == "train":
      sys.exit(loop.train(config, folder))
    evaluate.evaluate(config, folder, _CHECKPOINT.value or folder)
  except Exception as error:
    logging.debug("Traceback:", exc_info=True)
    lost_process.leave_if_another_is_lost(error)
    if not isinstance(error, (ValueError, OSError, errors.CheckpointError, loop.StopTraining)):
      raise
    _refuse(error)


if __name__ == "__main__":
  logging.set_verbosity(logging.WARNING)
  app.run(main, flags_parser=parse_flags)
