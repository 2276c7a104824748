"""The process that runs JAX: what it must set before the first computation, for XLA on CPU to be quick."""

import ctypes
import gc
import os
import sys

import jax

from mplug_jax.runtime import lost_process

_COMPILATION_WORTH_KEEPING = 0.1  # seconds
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # names and numbers of glibc's malloc.h


def _glibc():
  """The C library if it is glibc, else None."""
  library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
  return library if hasattr(library, "mallopt") else None


def prepare(compilation_cache=""):
  """Sets up Python's garbage collection, the compilation cache, last words of one process of several and, on CPU alone, memory and
  execution.

  Call it before the first computation.

  XLA on CPU allocates a program's temporary arrays at every execution. By default glibc gives such
  large blocks back to the kernel at once, and every step pays for its pages again, zeroed one by
  one: a fifth of a train step, small or large. Here the process keeps what it frees. glibc does so
  for the main thread alone, hence programs run on the thread that calls them; nothing is lost, for
  the devices are the same cores.

  Args:
    compilation_cache: folder of compiled programs, found again by later runs; "" = none.
  """
  gc.set_threshold(
    100_000, 20, 100
  )  # tracing makes objects by the million that stay; Python's default walks over them a thousand times
  jax.config.update(
    "jax_cpu_enable_async_dispatch", False
  )  # read when the devices are set up, by the next line at the latest
  if jax.default_backend() == "cpu" and (library := _glibc()):
    library.mallopt(_M_MMAP_MAX, 0)
    library.mallopt(_M_TRIM_THRESHOLD, -1)
    library.mallopt(_M_TOP_PAD, 1 << 26)
  # On CPU only process 0 finds its programs again, and gloo gives up when the others compile for 30
  # s more.
  if compilation_cache and (jax.process_count() == 1 or jax.default_backend() != "cpu"):
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(compilation_cache))
  if jax.process_count() > 1:
    lost_process.prepare(
      f"error: process {jax.process_index()} of {jax.process_count()} was ended from outside, or "
      f"because another one was "
      "lost: see above. Start all of them again with the same command; the run goes on from its "
      "last checkpoint."
    )


def tune_process(compilation_cache="~/.cache/mplug_jax"):
  """Changes settings of this process that make JAX on CPU faster; for programs, not for libraries.

  Sets Python's garbage collection thresholds, synchronous dispatch on CPU, glibc's memory
  thresholds (see `prepare`) and JAX's persistent compilation cache. The commands of this package
  call it; `Predictor.load` does not.

  Args:
    compilation_cache: folder for compiled programs that took 0.1 s or more; "" for none. A folder
      that JAX is already configured with stays.
  """
  prepare("" if jax.config.jax_compilation_cache_dir else compilation_cache)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", _COMPILATION_WORTH_KEEPING)


def release_freed_memory():
  """Gives freed memory back to the kernel now: after a compilation, whose scratch is not needed again."""
  if library := _glibc():
    library.malloc_trim(0)
