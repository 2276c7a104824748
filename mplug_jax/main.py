"""Command line of training and evaluation.

python -m mplug_jax.main --config=configs/vqa.py [--workdir=DIR] [--mode=train|evaluate]
"""

import os
import re
import sys
import warnings
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from mplug_jax import config as config_lib

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file of configs/, with an argument after a colon.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Folder of the run, local or gs://bucket/run; default: runs/<config name>."
)
_MODE = flags.DEFINE_enum(
  "mode", "train", ["train", "evaluate"], "Train and evaluate, or only evaluate a checkpoint."
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


def _start_distributed() -> None:
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


def _refuse(message: object) -> NoReturn:
  """Prints a message on stderr and exits with status 1."""
  print(f"error: {message}", file=sys.stderr)
  sys.exit(1)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line and returns the arguments that are no flags.

  A wrong flag or config exits with status 1 and a message of one line on stderr.
  """
  try:
    argv = config_lib.resolve_config_flag(argv)
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
    # absl wraps the message of an error inside the config file in tracebacks.
    while "\n" in str(cause) and cause.__context__:
      cause = cause.__context__
    _refuse(cause)
  except OSError as error:
    _refuse(f"The config cannot be read: {str(error).splitlines()[-1].strip()}.")
  except (AttributeError, KeyError):
    file = re.search(r"\0--?config[=\0]([^\0]*)", "\0".join(argv))
    assert file
    if unknown := config_lib.unknown_key(argv, flags.FLAGS["config"].parser.parse(file[1])):
      _refuse(unknown)
    raise
  if len(rest) > 1:
    _refuse(f"Unknown argument {rest[1]!r}; --help lists the flags.")
  return rest


def workdir(config: config_lib.Config) -> str:
  """Returns the run folder: --workdir, or runs/<config name>."""
  return _WORKDIR.value or os.path.join("runs", config.name)


def _quiet_other_writes() -> None:
  """Silences follow-up errors of Orbax's other writes when one write fails."""

  def hook(problem: Any) -> None:
    if str(problem.exc_value) != "Event loop is closed":
      sys.__unraisablehook__(problem)

  sys.unraisablehook = hook
  warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def main(argv: list[str]) -> None:
  """Trains, evaluates or prints the config; an expected error exits with status 1 and one line."""
  del argv
  config = CONFIG.value
  if _PRINT_CONFIG.value:
    try:
      print(config_lib.to_json(config), end="")
    except ValueError as error:
      _refuse(error)
    return
  folder = workdir(config)
  _start_distributed()
  from mplug_jax.checkpoints import errors
  from mplug_jax.runtime import lost_process
  from mplug_jax.training import evaluate, loop
  from mplug_jax.training.health import StopTraining

  _quiet_other_writes()
  try:
    if _MODE.value == "train":
      sys.exit(loop.train(config, folder))
    evaluate.evaluate(config, folder, _CHECKPOINT.value or folder)
  except Exception as error:
    logging.debug("Traceback:", exc_info=True)
    lost_process.leave_if_another_is_lost(error)
    if not isinstance(error, (ValueError, OSError, errors.CheckpointError, StopTraining)):
      raise
    _refuse(error)


if __name__ == "__main__":
  logging.set_verbosity(logging.WARNING)
  app.run(main, flags_parser=parse_flags)
