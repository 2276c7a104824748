"""The device mesh.

Its axes are "data" (batch), "fsdp" (batch and parameters) and "tensor" (heads, feed-forward units).
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

AXES = ("data", "fsdp", "tensor")

BATCH_AXES = ("data", "fsdp")


def target() -> tuple[str, str]:
  """Returns (platform, kind) of the devices that a program is traced for, attached or not.

  They are those of the mesh in use (`jax.set_mesh`), else JAX's default devices.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    default = jax.devices()[0]
    return default.platform, default.device_kind
  return device.platform, device.device_kind


def make_mesh(sizes: Any, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
  """Returns the mesh over the devices.

  Args:
    sizes: mapping or ConfigDict {"data": n, "fsdp": n, "tensor": n}; one of them may be -1, the
      rest of the devices.
    devices: None: all.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or processes would share rows
      of a batch.
  """
  devices = jax.devices() if devices is None else devices
  shape = [int(sizes[axis]) for axis in AXES]
  known = int(np.prod([n for n in shape if n != -1]))
  if shape.count(-1) == 1 and known > 0 and len(devices) % known == 0:
    shape[shape.index(-1)] = len(devices) // known
  if min(shape) < 1 or int(np.prod(shape)) != len(devices):
    given = {axis: int(sizes[axis]) for axis in AXES}
    raise ValueError(
      f"config.mesh={given} does not fit {len(devices)} devices: the sizes must "
      "multiply to that number, and one of them may be -1 for the rest."
    )
  processes = len({device.process_index for device in devices})
  if shape[0] * shape[1] % processes:
    raise ValueError(
      f"config.mesh has data x fsdp = {shape[0] * shape[1]}, which must be a multiple of the "
      f"{processes} processes: each reads rows of its own, so the tensor axis has to stay inside a "
      "process."
    )
  return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
