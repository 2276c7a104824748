"""Compiles both TPU kernels of attention for a slice; prints a line for each case.

Usage: compile_attention.py <slice, such as v5e:1x1>.
"""

import os
import sys

from mplug_jax.performance.tpu import topology

os.environ.update(topology.ENVIRONMENT)

import jax  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402

from mplug_jax.ops.attention import attention  # noqa: E402
from mplug_jax.ops.attention.common import CHANNELS, ROWS  # noqa: E402
from mplug_jax.parallel import mesh as mesh_lib  # noqa: E402

HEADS = 12
# (rows of a chip, queries, keys, causal, masked, dtype)
CASES = [
  (64, 25, 25, True, True, "bfloat16"),
  (16, 35, 577, False, False, "bfloat16"),
  (16, 577, 577, False, False, "bfloat16"),
  (16, 577, 577, False, False, "float32"),
  (16, 602, 602, False, True, "bfloat16"),
  (16, 100, 602, False, True, "bfloat16"),
  (2, 1297, 1297, False, False, "bfloat16"),
]


def main(name):
  devices = topology.slice_of(name).devices
  mesh = mesh_lib.make_mesh({"data": len(devices), "fsdp": 1, "tensor": 1}, devices)
  for rows, length, keys, causal, masked, dtype in CASES:

    def array(count, rows=rows, dtype=dtype):
      place = NamedSharding(mesh, CHANNELS)
      return jax.ShapeDtypeStruct((rows * len(devices), count, HEADS * 64), dtype, sharding=place)

    def run(query, key, value, cotangent, mask, causal=causal, masked=masked):
      def attend(*x):
        rng = jax.random.key(0)
        return attention(*x, HEADS, mask if masked else None, causal, rate=0.1, rng=rng)

      out, gradients = jax.vjp(attend, query, key, value)
      return out, gradients(cotangent)

    place = NamedSharding(mesh, ROWS)
    mask = jax.ShapeDtypeStruct((rows * len(devices), keys), bool, sharding=place)
    with jax.set_mesh(mesh):
      lowered = jax.jit(run).lower(array(length), array(keys), array(keys), array(length), mask)
      text = lowered.compile().as_text()
    print(length, keys, text.count("tpu_custom_call"))


if __name__ == "__main__":
  main(sys.argv[1])
