"""Command line: `python -m mplug_jax.main --config=configs/vqa.py [--workdir=DIR] [--mode=train|evaluate]`."""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with an argument behind a colon.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; default: runs/<config name>.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "Train and evaluate, or evaluate a checkpoint alone.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Run folder whose weights --mode=evaluate reads; default: the workdir.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of process 0; needed only where JAX cannot find out itself.")
_PROCESSES = flags.DEFINE_integer("processes", 0, "Number of processes, with --coordinator.")
_PROCESS = flags.DEFINE_integer("process", 0, "Number of this process, with --coordinator.")


def _start_distributed():
  """Joins the other processes of the run, when there are any."""
  import jax
  if _COORDINATOR.value:
    jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, heartbeat_timeout_seconds=60)
  elif "TPU_WORKER_HOSTNAMES" in os.environ and "," in os.environ["TPU_WORKER_HOSTNAMES"] or "SLURM_NTASKS" in os.environ:
    jax.distributed.initialize(heartbeat_timeout_seconds=60)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"Unknown argument {argv[1]!r}.")
  if _CONFIG.value is None:
    raise app.UsageError("--config=configs/vqa.py or another file of configs/ is needed.")
  config = _CONFIG.value
  workdir = _WORKDIR.value or os.path.join("runs", config.name)
  _start_distributed()
  from mplug_jax import train
  try:
    if _MODE.value == "train":
      sys.exit(train.train(config, workdir))
    train.evaluate(config, workdir, _CHECKPOINT.value or workdir)
  except (ValueError, FileNotFoundError, train.StopTraining) as error:
    logging.debug("Traceback:", exc_info=True)
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
  logging.set_verbosity(logging.WARNING)
  app.run(main)
