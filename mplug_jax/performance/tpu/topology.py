"""Abstract devices of TPU slices, for compiling without a TPU. Needs libtpu (the extra `tpu`)."""

import math
import re
from typing import Any, NamedTuple

from mplug_jax.flops import hardware

# Environment variables of the TPU compiler, to be set before JAX is imported: they turn off the
# search for a TPU, the log folder and the lock against other processes.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TPU_LOG_DIR": "disabled",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
  "JAX_PLATFORMS": "cpu",
}
EXAMPLES = (
  "v5e:1x1",
  "v5e:2x2",
  "v5e:4x4",
  "v5e:8x8",
  "v5e:16x16",
  "v6e:4x4",
  "v4:2x2x4",
  "v5p:2x2x4",
  "tpu7x:2x2x1",
)
# Without it a host of v5e and v6e has four chips.
_SINGLE = {"chips_per_host_bounds": (1, 1, 1)}
# One device a chip instead of one a core.
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}


class NoCompiler(RuntimeError):
  """The TPU compiler (libtpu) is not installed."""


class Slice(NamedTuple):
  """A TPU slice.

  Attributes:
    name: such as "v5e:4x4".
    devices: abstract JAX devices.
    chips: number of chips.
    chip: kind of the chips.
  """

  name: str
  devices: list[Any]
  chips: int
  chip: hardware.Chip


def slice_of(name: str) -> Slice:
  """Returns the slice of a name.

  Args:
    name: CHIP:SHAPE, such as "v5e:4x4".

  Raises:
    ValueError: the name has another form, the chip is unknown, or the compiler rejects the shape.
    NoCompiler: libtpu is not installed.
  """
  match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
  if not match:
    raise ValueError(f"--topology={name!r} is not CHIP:SHAPE, such as {', '.join(EXAMPLES)}.")
  chip = hardware.chip(match[1])
  count = math.prod(int(side) for side in match[2].split("x"))
  try:
    import libtpu  # noqa: F401 # pyright: ignore[reportMissingImports] (an extra)
  except ImportError:
    raise NoCompiler(
      'There is no TPU compiler here: pip install -e ".[tpu]" brings it '
      "(libtpu, about 700 MB; no TPU is needed)."
    ) from None
  from jax.experimental import topologies

  options = _OPTIONS.get(match[1], {}) | (_SINGLE if count == 1 else {})
  try:
    devices = topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices
  except Exception as error:  # The compiler raises errors of several classes.
    raise ValueError(
      f"The TPU compiler does not know --topology={name} ({str(error).splitlines()[0][:200]}); "
      f"it knows {', '.join(EXAMPLES)} and others."
    ) from None
  return Slice(name, list(devices), count, chip)
