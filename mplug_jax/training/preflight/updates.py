"""Checks of the train step: memory, finite losses and gradients, time of an update."""

import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.checkpoints import warm_start
from mplug_jax.config import Config
from mplug_jax.parallel import batches as batches_lib
from mplug_jax.parallel import rules
from mplug_jax.training.build import Host, build
from mplug_jax.training.preflight import machine
from mplug_jax.training.preflight.findings import Findings
from mplug_jax.training.start import compile_step

_UPDATES = 3  # timed after the first
_STALL = 1.1  # a batch may take this multiple of the time of an update


def check_updates(
  findings: Findings,
  config: Config,
  tokenizer: Any,
  batch: dict[str, np.ndarray],
  batch_seconds: float,
  steps: int,
  steps_per_epoch: int,
) -> None:
  """Compiles the train step and makes a few updates with one batch.

  Args:
    findings: receives the results.
    config: of the run.
    tokenizer: of the run.
    batch: host batch of config.batch_size examples.
    batch_seconds: time in which the input pipeline makes a batch.
    steps: number of updates of the run.
    steps_per_epoch: number of updates of an epoch.
  """
  built = build(config, tokenizer, steps, steps_per_epoch)
  with jax.set_mesh(built.mesh):
    step, compile_seconds = compile_step(built, config.batch_size)
    state = built.init()
    if config.init.paths:
      state, origins = warm_start.init_from(state, config.init)
      findings.add("weights", *warm_start.summary(origins))
    memory = _memory(findings, step, built.mesh)
    if memory is None:
      return
    shape = " x ".join(f"{axis} {n}" for axis, n in built.mesh.shape.items())
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    findings.add(
      "step",
      f"{parameters / 1e6:.2f} million parameters on {shape}; "
      f"compiled in {compile_seconds:.1f} s{memory}",
    )
    losses, seconds = _updates(findings, built, step, state, batch)
  if not seconds:
    return
  update = min(seconds[1:])
  duration = _duration(steps * max(update, batch_seconds))
  findings.add(
    "updates",
    f"loss {', '.join(f'{loss:.3f}' for loss in losses)} with the same batch; "
    f"{update:.3f} s each, so {steps:,} updates take {duration} besides evaluation",
  )
  if batch_seconds > _STALL * update:
    findings.warn(
      f"Data are slower than the device, {batch_seconds:.3f} s a batch against {update:.3f} s an "
      "update: raise config.loader.workers or config.loader.threads (this machine has "
      f"{os.cpu_count()} cores), or store smaller images."
    )


def _memory(findings: Findings, step: Any, mesh: Any) -> str | None:
  """Returns the memory need of a compiled step as text, or None if it exceeds a device's."""
  memory = step.memory_analysis()
  if not memory:
    return ""
  size = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  limit = (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit", 0)
  limit = limit or machine.available_memory() // mesh.size
  if limit and size > limit:
    findings.error(
      f"The train step needs {size / 2**30:.2f} GiB a device, which has {limit / 2**30:.1f}: lower "
      "config.batch_size, raise config.optim.microbatches, or set config.model.remat=full."
    )
    return None
  return f"; needs {size / 2**30:.2f} of {limit / 2**30:.1f} GiB a device"


def _updates(
  findings: Findings, built: Any, step: Any, state: Any, host_batch: dict[str, np.ndarray]
) -> tuple[list[float], list[float]]:
  """Returns (losses, seconds) of a few updates, ([], []) if one is not finite."""
  healthy = jax.device_put(jnp.bool_(True), rules.replicated(built.mesh))
  losses: list[float] = []
  seconds: list[float] = []
  for _ in range(1 + _UPDATES):
    start = time.perf_counter()
    prepared = built.task.prepare(state, host_batch, Host(built.predict))
    state, metrics, health = step(state, batches_lib.put_batch(prepared, built.mesh), healthy)
    total, count = jax.device_get(metrics["loss"])
    seconds.append(time.perf_counter() - start)
    losses.append(float(total / count))
    if not bool(health["ok"]):
      findings.error(
        f"After update {len(losses)} a loss or a gradient is not finite: a smaller "
        "config.optim.lr, gradient clipping or float32 usually helps."
      )
      return [], []
  return losses, seconds


def _duration(seconds: float) -> str:
  for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
    if seconds >= 2 * length:
      return f"{seconds / length:.1f} {unit}"
  return f"{seconds:.0f} seconds"
