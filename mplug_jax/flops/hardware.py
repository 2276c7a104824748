"""Published peak rates of chips; no JAX."""

from typing import NamedTuple

GB, GIB, TERA = 1e9, 2.0**30, 1e12


class Chip(NamedTuple):
  """Rates of one chip.

  Attributes:
    flops: bfloat16 operations a second.
    memory: bytes of HBM.
    bandwidth: bytes a second of HBM.
    links: bytes a second to other chips in one direction, over all links together.
    source: publication with the numbers.
  """

  flops: float
  memory: float
  bandwidth: float
  links: float
  source: str


# "Cloud TPU documentation" means the pages of docs.cloud.google.com/tpu/docs. They give the
# interconnect of both directions together, of which this table has half. Their memory is in GiB, as
# the page of TPU7x states and the limits of the compiler confirm.
CHIPS = {
  # The page of v4 does not give its links: six of 50 GB/s, Jouppi et al., "TPU v4", ISCA 2023,
  # section 2.
  "v4": Chip(275 * TERA, 32 * GIB, 1200 * GB, 300 * GB, "Cloud TPU documentation, TPU v4"),
  "v5e": Chip(197 * TERA, 16 * GIB, 819 * GB, 200 * GB, "Cloud TPU documentation, TPU v5e"),
  "v5p": Chip(459 * TERA, 95 * GIB, 2765 * GB, 600 * GB, "Cloud TPU documentation, TPU v5p"),
  "v6e": Chip(918 * TERA, 32 * GIB, 1638 * GB, 400 * GB, "Cloud TPU documentation, TPU v6e"),
  "tpu7x": Chip(2307 * TERA, 192 * GIB, 7380 * GB, 600 * GB, "Cloud TPU documentation, TPU7x"),
}

# jax.Device.device_kind -> bfloat16 operations a second of a device. A device is a chip; of v2, v3
# and TPU7x it is one of the two cores of a chip.
_DEVICES = {
  # Chips of v2 and v3: Cloud TPU documentation, TPU v2 and v3.
  "TPU v2": 45 * TERA / 2,
  "TPU v3": 123 * TERA / 2,
  "TPU v4": CHIPS["v4"].flops,
  "TPU v5 lite": CHIPS["v5e"].flops,
  "TPU v5e": CHIPS["v5e"].flops,
  "TPU v5": CHIPS["v5p"].flops,
  "TPU v5p": CHIPS["v5p"].flops,
  "TPU v6 lite": CHIPS["v6e"].flops,
  "TPU v6e": CHIPS["v6e"].flops,
  "TPU7x": CHIPS["tpu7x"].flops / 2,
  # NVIDIA's data sheets, dense tensor cores; float16 for those without bfloat16.
  "Tesla T4": 65 * TERA,
  "Tesla V100-SXM2-16GB": 125 * TERA,
  "NVIDIA L4": 121 * TERA,
  "NVIDIA A100-SXM4-40GB": 312 * TERA,
  "NVIDIA A100-SXM4-80GB": 312 * TERA,
  "NVIDIA H100 80GB HBM3": 989 * TERA,
}


def chip(name: str) -> Chip:
  """Returns the chip of a name.

  Args:
    name: key of CHIPS, such as "v5e".

  Raises:
    ValueError: the chip is unknown.
  """
  if name not in CHIPS:
    raise ValueError(f"The chip {name!r} is unknown; there are {', '.join(CHIPS)}.")
  return CHIPS[name]


def peak_flops(device_kind: str) -> float | None:
  """Returns the bfloat16 operations a second of a device, or None if unknown (CPUs, other GPUs).

  Args:
    device_kind: jax.Device.device_kind.
  """
  return _DEVICES.get(device_kind)
