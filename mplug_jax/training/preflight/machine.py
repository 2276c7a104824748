"""Checks of the machine: memory, disk, software versions, accelerators."""

import contextlib
import importlib.metadata
import os
import platform
import shutil

import jax

from mplug_jax.runtime import files
from mplug_jax.runtime.accelerators import unused_accelerator
from mplug_jax.training.preflight.findings import Findings

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
_EXTRAS = {"gpu": "cuda", "tpu": "tpu"}


def available_memory() -> int:
  """Returns the available main memory in bytes, or 0 where the system does not report it."""
  with contextlib.suppress(OSError), open("/proc/meminfo") as file:
    for line in file:
      if line.startswith("MemAvailable:"):
        return int(line.split()[1]) * 1024
  return 0


def check_machine(findings: Findings, workdir: str) -> None:
  """Reports processor, memory, disk space for `workdir` and software versions."""
  findings.add(
    "machine",
    f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
    f"{available_memory() / 2**30:.1f} GiB of memory available, {_free_space(workdir)}",
  )
  versions = []
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions.append(f"{name} {importlib.metadata.version(name)}")
  half = -(-len(versions) // 2)
  findings.add(
    "software",
    f"Python {platform.python_version()}, {', '.join(versions[:half])}",
    ", ".join(versions[half:]),
  )


def _free_space(workdir: str) -> str:
  """Returns a phrase for the free disk space of a folder that need not exist."""
  if files.is_remote(workdir):
    return f"{workdir} is in an object store"
  parent = os.path.abspath(workdir)
  while not os.path.isdir(parent):
    parent = os.path.dirname(parent)
  return f"{shutil.disk_usage(parent).free / 2**30:.1f} GiB free for {workdir}"


def check_devices(findings: Findings) -> None:
  """Reports JAX's devices; an accelerator that JAX does not use is an error."""
  kinds = [device.device_kind for device in jax.devices()]
  counts = [f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)]
  findings.add("devices", ", ".join(counts))
  if kind := unused_accelerator(jax.default_backend()):
    findings.error(
      f"This machine has a {kind.upper()}, but JAX uses the CPU: run "
      f"pip install 'mplug_jax[{_EXTRAS[kind]}]' and make sure that no other program holds the "
      "device; set JAX_PLATFORMS=cpu to use the CPU on purpose."
    )
