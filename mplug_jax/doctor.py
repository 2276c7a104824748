"""Checks machine, config and data before a run, with real batches and a few real updates.

    python -m mplug_jax.doctor --config=configs/vqa.py:data=jsonl,root=/my/data

It takes the flags of mplug_jax.main, so that the command of a run also checks it, and --records:
the number of records of each split that are read and whose images are opened (0: all, as
`tools.prepare_data check`). It writes nothing and does not change a run in --workdir. Exit status:
0 if training will work, with or without warnings; 1 otherwise.
"""

import sys
import tempfile
import time

from absl import app, flags, logging

from mplug_jax import config as config_lib
from mplug_jax import main as command

_RECORDS = flags.DEFINE_integer(
  "records", 300, "Records of each split that are read, evenly spaced; 0: all.", lower_bound=0
)


def examine(config: config_lib.Config, workdir: str, records: int = 300) -> int:
  """Prints the findings of all checks.

  Args:
    config: of the run.
    workdir: folder of the run; it need not exist.
    records: number of records of each split that are read, evenly spaced; 0: all.

  Returns:
    The number of errors, which training would fail with.
  """
  from mplug_jax import data, tasks
  from mplug_jax.evaluators import get as get_evaluator
  from mplug_jax.runtime import process
  from mplug_jax.training import workdir as workdir_lib
  from mplug_jax.training.preflight import batches, findings, machine, updates
  from mplug_jax.training.start import count_steps

  report = findings.Findings()
  machine.check_machine(report, workdir)
  machine.check_devices(report)
  with tempfile.TemporaryDirectory() as folder, report.catch():
    process.prepare(config.compilation_cache)
    tasks.get(config.task.name)
    get_evaluator(config.task.name)
    start = time.perf_counter()
    source = data.get_source(config, "train")
    steps, per_epoch = count_steps(config, source)
    report.add(
      "config",
      f"{config.name}: {steps:,} updates of {config.batch_size} examples, "
      f"{steps / per_epoch:.1f} epochs of {len(source):,} records, which open in "
      f"{time.perf_counter() - start:.1f} s",
    )
    tokenizer = workdir_lib.prepare_tokenizer(config, folder, source)
    report.add("tokenizer", f"{config.tokenizer.kind} of {tokenizer.vocab_size:,} tokens")
    batches.check_splits(report, config, tokenizer, records)
    first, seconds = batches.check_batches(report, config, tokenizer, source)
    updates.check_updates(report, config, tokenizer, first, seconds, steps, per_epoch)
  report.verdict()
  return report.errors


def main(argv: list[str]) -> None:
  """Exits with status 0 if training will work, else 1."""
  del argv
  config = command.CONFIG.value
  sys.exit(1 if examine(config, command.workdir(config), _RECORDS.value) else 0)


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main, flags_parser=command.parse_flags)
