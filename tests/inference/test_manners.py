"""Predictor.load changes nothing in the process that calls it.

Tune_process() does, when it is asked for.
"""

import os
import subprocess
import sys

from tests.support import paths, predictor_run

PROGRAM = """
import gc, os, sys
import cv2  # sets LD_LIBRARY_PATH itself
import jax
import mplug_jax
from mplug_jax.runtime import process

def refuse():
  raise AssertionError("Predictor.load asked for the C library")

process._glibc = refuse
run, image = sys.argv[1:]
jax.devices()
def state():
  return {
    "gc": gc.get_threshold(),
    "unraisablehook": sys.unraisablehook,
    **jax.config.values,
    **os.environ,
  }

before = state()
model = mplug_jax.Predictor.load(run)
model.answer(image, "is there a red circle?")
after = state()
assert before == after, {k: (before.get(k), v) for k, v in after.items() if before.get(k) != v}
assert not os.path.exists(os.path.expanduser("~/.cache/mplug_jax"))

process._glibc = lambda: None
mplug_jax.tune_process()
assert gc.get_threshold()[0] == 100_000
assert jax.config.jax_compilation_cache_dir == os.path.expanduser("~/.cache/mplug_jax")
jax.config.update("jax_compilation_cache_dir", "/another")
mplug_jax.tune_process()
assert jax.config.jax_compilation_cache_dir == "/another"
"""


def test_load_and_answer_leave_the_process_as_it_was(tmp_path):
  run = predictor_run.save(tmp_path / "run", predictor_run.config("vqa"))
  environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "OPENCV_"))}
  environment |= {"JAX_PLATFORMS": "cpu", "HOME": str(tmp_path), "PYTHONPATH": str(paths.ROOT)}
  result = subprocess.run(
    [sys.executable, "-c", PROGRAM, str(run), str(paths.ROOT / "docs" / "scene.png")],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
