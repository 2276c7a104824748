"""TPU slices by name, as abstract devices to compile for; no TPU is needed, the compiler is (the extra `tpu`)."""

import re
from typing import NamedTuple

from mplug_jax.flops import hardware as chips

# What the TPU compiler must find in the environment before JAX is imported: no search for a TPU, no log folder, no lock against others.
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
_SINGLE = {"chips_per_host_bounds": (1, 1, 1)}  # else a host of v5e and v6e has four chips
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}  # one device a chip, not one a core


class NoCompiler(RuntimeError):
  """There is no TPU compiler here."""


class Slice(NamedTuple):
  """`devices`: abstract ones; `chips` of the kind `chip`."""

  name: str
  devices: list
  chips: int
  chip: chips.Chip


def slice_of(name):
  """ "v5e:4x4" -> Slice.

  Raises:
    ValueError: not a name of a slice, or of a chip that chips.CHIPS lacks, or a shape that the compiler does not take. NoCompiler.
  """
  found = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
  if not found:
    raise ValueError(f"--topology={name!r} is not CHIP:SHAPE, such as {', '.join(EXAMPLES)}.")
  chip, bounds = chips.chip(found[1]), [int(n) for n in found[2].split("x")]
  count = 1
  for n in bounds:
    count *= n
  try:
    import libtpu  # noqa: F401
  except ImportError:
    raise NoCompiler(
      'There is no TPU compiler here: pip install -e ".[tpu]" brings it (libtpu, about 700 MB; no TPU is needed).'
    ) from None
  from jax.experimental import topologies

  options = _OPTIONS.get(found[1], {}) | (_SINGLE if count == 1 else {})
  try:
    devices = topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices
  except Exception as error:  # the compiler's own, of several classes
    raise ValueError(
      f"The TPU compiler does not know --topology={name} ({str(error).splitlines()[0][:200]}); it knows "
      f"{', '.join(EXAMPLES)} and others."
    ) from None
  return Slice(name, list(devices), count, chip)
