"""Detects accelerators of this machine, whether JAX can use them or not.

Imports the standard library alone, so that it works before JAX is installed.
"""

import os
from collections.abc import Callable, Mapping

# Files that exist on a machine with an accelerator, even if JAX cannot use it.
_ACCELERATORS = {"gpu": ("/dev/nvidia0", "/dev/kfd"), "tpu": ("/dev/accel0", "/dev/vfio/0")}


def unused_accelerator(
  backend: str,
  environment: Mapping[str, str] = os.environ,
  exists: Callable[[str], bool] = os.path.exists,
) -> str:
  """Returns the kind of accelerator that the machine has although JAX runs on the CPU.

  Args:
    backend: result of jax.default_backend().
    environment: environment variables.
    exists: function that returns whether a path exists.

  Returns:
    "gpu", "tpu", or "" if there is none or JAX_PLATFORMS asks for the CPU.
  """
  if backend != "cpu" or environment.get("JAX_PLATFORMS") == "cpu":
    return ""
  if (
    "TPU_NAME" in environment
    or "COLAB_TPU_ADDR" in environment
    or any(map(exists, _ACCELERATORS["tpu"]))
  ):
    return "tpu"
  return "gpu" if any(map(exists, _ACCELERATORS["gpu"])) else ""
