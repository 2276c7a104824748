"""The process keeps the memory that XLA's executions free, so that its pages are mapped once."""

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import jax, jax.numpy as jnp
from mplug_jax.runtime import process as host
if sys.argv[1] == "prepared":
  host.prepare()
# A temporary array of 64 MiB.
f = jax.jit(lambda x: jnp.cumsum(x[:, None] * jnp.ones(16), axis=0).max())
x = jnp.arange(1 << 20, dtype=jnp.float32)
f(x).block_until_ready()
host.release_freed_memory()
f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
  f(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _page_faults(how):
  environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  run = subprocess.run(
    [sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True, env=environment
  )
  return int(run.stdout)


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="only glibc gives freed memory back so readily"
)
def test_executions_do_not_pay_for_their_pages_again():
  # A thousandth with jax 0.10, a third with 0.12. A busy kernel may take pages back once.
  limit = 0.5 * _page_faults("plain")
  assert any(_page_faults("prepared") < limit for _ in range(3))
