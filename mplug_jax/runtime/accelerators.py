"""What accelerator a machine has, whether JAX can use it or not.

Imports nothing that has to be installed first.
"""

import os

# What shows that a machine has an accelerator, though JAX may not see it.
_ACCELERATORS = {"gpu": ("/dev/nvidia0", "/dev/kfd"), "tpu": ("/dev/accel0", "/dev/vfio/0")}


def unused_accelerator(backend, environment=os.environ, exists=os.path.exists):
  """The kind of accelerator, "gpu" or "tpu", that is there though JAX runs on the CPU, or "".

  Args:
    backend: what jax.default_backend() says. environment, exists: how to find out.
  """
  if backend != "cpu" or environment.get("JAX_PLATFORMS") == "cpu":  # asked for
    return ""
  if (
    "TPU_NAME" in environment
    or "COLAB_TPU_ADDR" in environment
    or any(map(exists, _ACCELERATORS["tpu"]))
  ):
    return "tpu"
  return "gpu" if any(map(exists, _ACCELERATORS["gpu"])) else ""
