"""Will this machine, this config and this data train? One screen that says so, from a real batch and a real update.

    python -m mplug_jax.doctor --config=configs/vqa.py:data=jsonl,root=/my/data

It takes the flags of mplug_jax.main, so that the command of a run becomes that of its examination, and --records, how many records of
each split are read and whose images are opened (0: all, as `tools.prepare_data check` does). Nothing is written, and a run in --workdir
is left alone. Exit status: 0 it will train, whatever the warnings say; 1 it will not.
"""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time

from absl import app, flags, logging

from mplug_jax import main as command
from mplug_jax.runtime.accelerators import unused_accelerator

_RECORDS = flags.DEFINE_integer(
  "records", 300, "Records of each split that are read, evenly spaced; 0: all.", lower_bound=0
)

_PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "numpy",
  "opencv-python-headless",
  "sentencepiece",
  "tokenizers",
)
_LABEL = 10  # columns
_UPDATES = 3  # timed behind the first
_DATA_SECONDS = 5.0  # that reading batches is timed for, at most
_STALL = 1.1  # of the time of an update that a batch may take
_SPLITS = {"train": "train_files", "val": "val_file", "test": "test_file"}
_EXTRAS = {"gpu": "cuda", "tpu": "tpu"}


class _Screen:
  """Prints findings as they come, and remembers what stands in the way of training."""

  def __init__(self):
    self.errors = self.warnings = 0

  def say(self, label, *lines):
    for number, line in enumerate(lines):
      print(f"{label if number == 0 else '':<{_LABEL}}{line}", flush=True)

  def warn(self, sentence):
    self.warnings += 1
    self.say("warning", sentence)

  def error(self, sentence):
    self.errors += 1
    self.say("error", sentence)

  @contextlib.contextmanager
  def part(self):
    """Whatever a run would end with is one more error here."""
    from mplug_jax.checkpoints import errors

    try:
      yield
    except (ValueError, OSError, errors.CheckpointError) as error:
      logging.debug("Traceback:", exc_info=True)
      self.error(error)


def available_memory():
  """Bytes of main memory that can be had, or 0 where the system does not say."""
  with contextlib.suppress(OSError), open("/proc/meminfo") as file:
    for line in file:
      if line.startswith("MemAvailable:"):
        return int(line.split()[1]) * 1024
  return 0


def _machine(screen, workdir):
  parent = os.path.abspath(workdir)
  while not os.path.isdir(parent):
    parent = os.path.dirname(parent)
  screen.say(
    "machine",
    f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {available_memory() / 2**30:.1f} GiB of memory "
    f"available, {shutil.disk_usage(parent).free / 2**30:.1f} GiB free for {workdir}",
  )
  versions = []
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions.append(f"{name} {importlib.metadata.version(name)}")
  half = -(-len(versions) // 2)
  screen.say(
    "software",
    f"Python {platform.python_version()}, {', '.join(versions[:half])}",
    ", ".join(versions[half:]),
  )


def _devices(screen):
  import jax

  kinds = [device.device_kind for device in jax.devices()]
  screen.say("devices", ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)))
  if kind := unused_accelerator(jax.default_backend()):
    screen.error(
      f"This machine has a {kind.upper()}, but JAX uses the CPU: pip install 'mplug_jax[{_EXTRAS[kind]}]', and see that no "
      "other program holds the device; JAX_PLATFORMS=cpu says that the CPU is meant."
    )


def _data(screen, config, tokenizer):
  """What data_check finds, of the training split and of the one that is evaluated."""
  from mplug_jax.data import check
  from mplug_jax.data.check import report as report_lib

  for split in dict.fromkeys(("train", config.eval.split)):
    with screen.part():
      report = check.check(config, split, tokenizer, limit=_RECORDS.value)
      lines = report_lib.lines(report)
      screen.say(
        split, *(line for line in lines if not line.startswith(("warning: ", "error: ", "  words")))
      )
      for sentence in report.warnings:
        screen.warn(f"{split}: {sentence}")
      for sentence in report.errors:
        screen.error(f"{split}: {sentence}")


def _batch(screen, config, tokenizer, source):
  """Reads batches for a while. Returns (the first one, seconds a batch)."""
  from mplug_jax import data
  from mplug_jax.data import pipeline

  with contextlib.closing(
    pipeline.train_batches(
      source,
      data.make_transform(config, tokenizer, train=True),
      batch_size=config.batch_size,
      seed=config.seed,
      workers=config.loader.workers,
      threads=config.loader.threads,
      block=config.data.shuffle_block,
    )
  ) as batches:
    start = time.perf_counter()
    first = next(batches)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < _DATA_SECONDS and count < 20:
      next(batches)
      count += 1
    seconds = (time.perf_counter() - begin) / count
  shapes = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in first.items() if x.ndim > 1)
  by = (
    f"{config.loader.workers} processes"
    if config.loader.workers
    else f"{config.loader.threads} threads"
  )
  screen.say(
    "batch",
    shapes,
    f"the first took {begin - start:.2f} s, others {seconds:.3f} s each: {config.batch_size / seconds:,.0f} "
    f"examples a second with {by}",
  )
  if corrupt := int(first["corrupt"].sum()) if "corrupt" in first else 0:
    screen.warn(f"{corrupt} of {config.batch_size} images of the first batch cannot be read.")
  return first, seconds


def _step(screen, config, tokenizer, first, batch_seconds, steps, steps_per_epoch):
  """Compiles the train step and makes a few updates with one batch."""
  import jax
  import jax.numpy as jnp

  from mplug_jax.checkpoints import warm_start
  from mplug_jax.parallel import batches as batches_lib
  from mplug_jax.parallel import rules
  from mplug_jax.training import loop
  from mplug_jax.training.build import Host, build

  built = build(config, tokenizer, steps, steps_per_epoch)
  with jax.set_mesh(built.mesh):
    step, compile_seconds = loop.compile_step(built, config.batch_size)
    state, healthy = built.init(), jax.device_put(jnp.bool_(True), rules.replicated(built.mesh))
    if config.init.paths:
      state, origins = warm_start.init_from(state, config.init)
      screen.say("weights", *warm_start.summary(origins))
    shape = " x ".join(f"{axis} {n}" for axis, n in built.mesh.shape.items())
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    memory, need = step.memory_analysis(), ""
    if memory:
      size = memory.argument_size_in_bytes + memory.temp_size_in_bytes
      device = built.mesh.devices.flat[0]
      limit = (device.memory_stats() or {}).get(
        "bytes_limit", 0
      ) or available_memory() // built.mesh.size
      need = f"; needs {size / 2**30:.2f} of {limit / 2**30:.1f} GiB a device"
      if limit and size > limit:
        screen.error(
          f"The train step needs {size / 2**30:.2f} GiB a device, which has {limit / 2**30:.1f}: lower config.batch_size, raise "
          "config.optim.microbatches, or set config.model.remat=full."
        )
        return
    screen.say(
      "step",
      f"{parameters / 1e6:.2f} million parameters on {shape}; compiled in {compile_seconds:.1f} s{need}",
    )
    seconds, losses = [], []
    for _ in range(1 + _UPDATES):
      start = time.perf_counter()
      batch = batches_lib.put_batch(
        built.task.prepare(state, first, Host(built.predict)), built.mesh
      )
      state, metrics, health = step(state, batch, healthy)
      total, count = jax.device_get(metrics["loss"])
      seconds.append(time.perf_counter() - start)
      losses.append(float(total / count))
      if not bool(health["ok"]):
        screen.error(
          f"After update {len(losses)} a loss or a gradient is not finite: a smaller config.optim.lr, gradient clipping or "
          "float32 usually helps."
        )
        return
  update = min(seconds[1:])
  screen.say(
    "updates",
    f"loss {', '.join(f'{loss:.3f}' for loss in losses)} with the same batch; {update:.3f} s each, so {steps:,} "
    f"updates take {_duration(steps * max(update, batch_seconds))} besides evaluation",
  )
  if batch_seconds > _STALL * update:
    screen.warn(
      f"Data are slower than the device, {batch_seconds:.3f} s a batch against {update:.3f} s an update: raise "
      f"config.loader.workers or config.loader.threads (this machine has {os.cpu_count()} cores), or store smaller images."
    )


def _duration(seconds):
  for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
    if seconds >= 2 * length:
      return f"{seconds / length:.1f} {unit}"
  return f"{seconds:.0f} seconds"


def examine(config, workdir):
  """Prints what there is to say. Returns the number of errors, things that training would fail with."""
  screen = _Screen()
  _machine(screen, workdir)
  _devices(screen)
  with tempfile.TemporaryDirectory() as folder, screen.part():
    from mplug_jax import data, tasks
    from mplug_jax.evaluators import get as get_evaluator
    from mplug_jax.runtime import process
    from mplug_jax.training import loop
    from mplug_jax.training import workdir as workdir_lib

    process.prepare(config.compilation_cache)
    tasks.get(config.task.name)
    get_evaluator(config.task.name)
    start = time.perf_counter()
    source = data.get_source(config, "train")
    steps, per_epoch = loop.count_steps(config, source)
    screen.say(
      "config",
      f"{config.name}: {steps:,} updates of {config.batch_size} examples, {steps / per_epoch:.1f} epochs of "
      f"{len(source):,} records, which open in {time.perf_counter() - start:.1f} s",
    )
    tokenizer = workdir_lib.prepare_tokenizer(config, folder, source)
    screen.say("tokenizer", f"{config.tokenizer.kind} of {tokenizer.vocab_size:,} tokens")
    _data(screen, config, tokenizer)
    first, seconds = _batch(screen, config, tokenizer, source)
    _step(screen, config, tokenizer, first, seconds, steps, per_epoch)
  warnings = f", {screen.warnings} warning{'s' * (screen.warnings > 1)}" * bool(screen.warnings)
  screen.say(
    "verdict",
    f"this will not train, {screen.errors} error{'s' * (screen.errors > 1)}{warnings}"
    if screen.errors
    else f"this will train{warnings}",
  )
  return screen.errors


def main(argv):
  """Exits with the status that the module's docstring says."""
  del argv
  config = command.CONFIG.value
  sys.exit(1 if examine(config, command.workdir(config)) else 0)


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main, flags_parser=command.parse_flags)
