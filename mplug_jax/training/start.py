"""Starts a run: number of steps, compiled train step, new or restored state."""

import os
import time
from collections.abc import Sequence, Sized
from concurrent.futures import Executor, Future
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from mplug_jax.checkpoints import warm_start
from mplug_jax.checkpoints.manager import Manager
from mplug_jax.config import Config
from mplug_jax.data import check
from mplug_jax.data.text import tokenizer_base
from mplug_jax.data.types import Source
from mplug_jax.parallel import batches as batches_lib
from mplug_jax.parallel import rules
from mplug_jax.runtime import atomic_files
from mplug_jax.training.build import Build
from mplug_jax.training.state import TrainState


def count_steps(config: Config, source: Sized) -> tuple[int, int]:
  """Returns the number of steps of the run and of an epoch.

  Args:
    config: config of the run.
    source: training records, with a length.

  Raises:
    ValueError: the run has no steps.
  """
  steps_per_epoch = max(1, len(source) // config.batch_size)
  total_steps = config.total_steps or int(config.total_epochs * steps_per_epoch)
  if total_steps < 1:
    raise ValueError("Set config.total_steps or config.total_epochs: the run has no updates to do.")
  return total_steps, steps_per_epoch


def warn_about_data(config: Config, split: str, source: Source | Sequence[Any]) -> None:
  """Logs what is implausible about a few images and boxes of a split; process 0 alone.

  Args:
    config: config of the run.
    split: name of the split, for messages.
    source: its records.
  """
  if jax.process_index() == 0:
    for sentence in check.sample_warnings(config, source):
      logging.warning("Split %s, a sample: %s", split, sentence)


def compile_step(built: Build, batch_size: int) -> tuple[jax.stages.Compiled, float]:
  """Traces and compiles the train step on abstract arrays.

  Args:
    built: result of `build`.
    batch_size: rows of the global batch.

  Returns:
    The compiled step and the seconds that it took.
  """
  begin = time.perf_counter()
  with jax.set_mesh(built.mesh):  # the mesh belongs to a thread
    batch = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=batches_lib.batch_sharding(built.mesh)
      ),
      built.task.batch_spec(batch_size),
    )
    healthy = jax.ShapeDtypeStruct((), jnp.bool_, sharding=rules.replicated(built.mesh))
    compiled = built.train_step.lower(built.abstract, batch, healthy).compile()
  return compiled, time.perf_counter() - begin


def start_state(
  config: Config,
  workdir: str,
  built: Build,
  manager: Manager,
  tokenizer: tokenizer_base.Tokenizer,
  executor: Executor,
) -> tuple[TrainState, int, Future[tuple[jax.stages.Compiled, float]]]:
  """Makes or restores the state while `executor` compiles the train step, which takes as long.

  Args:
    config: config of the run.
    workdir: run folder; init.json is written there when the run starts from other weights.
    built: result of `build`.
    manager: checkpoints of the run.
    tokenizer: tokenizer of the run.
    executor: runs the compilation.

  Returns:
    The state, its step, and the future of `compile_step`.
  """
  if manager.latest_step() is not None:
    compilation = executor.submit(compile_step, built, config.batch_size)
    state, saved = manager.restore(built.abstract)
    tokenizer_base.check_same(tokenizer, saved["tokenizer"], f"the checkpoint in {workdir}")
    step = int(state.step)
    print(f"resumed at step {step}", flush=True)
    return state, step, compilation
  # Lowered before the step is traced, which holds Python's lock.
  lowered = built.init.lower()
  compilation = executor.submit(compile_step, built, config.batch_size)
  state = lowered.compile()()
  if config.init.paths:
    state, origins = warm_start.init_from(state, config.init)
    if jax.process_index() == 0:
      atomic_files.write_json(os.path.join(workdir, "init.json"), origins)
      print("\n".join(warm_start.summary(origins)), flush=True)
  return state, 0, compilation


def report_step(mesh: jax.sharding.Mesh, step: jax.stages.Compiled, compile_seconds: float) -> None:
  """Prints the devices and the memory that the compiled step needs on each.

  Args:
    mesh: mesh of the run.
    step: compiled train step.
    compile_seconds: time of its compilation.
  """
  memory = step.memory_analysis()
  size = "unknown"
  if memory:
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    size = f"{needed / 2**30:.2f} GiB a device"
  shape = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
  print(
    f"devices: {mesh.size} {mesh.devices.flat[0].device_kind} as {shape}; "
    f"step compiled in {compile_seconds:.1f} s, needs {size}",
    flush=True,
  )
