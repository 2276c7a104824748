"""What the notebooks share: the runtime, commands whose output a cell shows, pictures.

Imports no JAX.

MPLUG_NOTEBOOK_TINY=1 runs every cell with the tiny preset on what is installed already: how the
tests run them. MPLUG_NOTEBOOK_RUNS is the folder of what they make.
"""

import importlib
import os
import pathlib
import subprocess
import sys

from mplug_jax.runtime.accelerators import unused_accelerator

TINY = bool(os.environ.get("MPLUG_NOTEBOOK_TINY"))
ROOT = pathlib.Path(__file__).resolve().parent.parent
RUNS = pathlib.Path(
  os.environ.get("MPLUG_NOTEBOOK_RUNS") or ROOT / "runs" / "notebook"
)  # where cells leave what they make
_NAMES = {"tpu": "a TPU", "gpu": "a GPU", "cpu": "a CPU alone"}
_EXTRAS = {"tpu": ("tpu",), "gpu": ("cuda",), "cpu": ()}


class Stop(Exception):
  """Ends a notebook with one sentence; Jupyter shows it instead of a traceback."""

  def _render_traceback_(self):
    return [f"stopped: {self}"]


def setup(*extras):
  """Installs this clone for the runtime, with `extras` of setup.py, and goes to its folder -> "tpu", "gpu" or "cpu".

  Raises:
    Stop: JAX's backend is not what the runtime offers, or the installation failed.
  """
  os.chdir(ROOT)
  kind = unused_accelerator("cpu") or "cpu"
  if not TINY:
    names = ",".join((*extras, *_EXTRAS[kind]))
    run("-m", "pip", "install", "--quiet", "-e", f".[{names}]" if names else ".")
    importlib.invalidate_caches()  # this process finds what was just installed
  check(kind)
  print(f"This runtime has {_NAMES[kind]}, and JAX uses it.")
  return kind


def check(kind):
  """Raises Stop unless JAX runs on this kind of device; one sentence says what to do.

  Another process tries: this one would keep the device from the trainings that cells start.
  """
  done = subprocess.run(
    [sys.executable, "-c", "import jax; print(jax.default_backend())"],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  if done.returncode:
    raise Stop(
      f"This runtime has {_NAMES[kind]}, but JAX does not start "
      f"({done.stderr.strip().splitlines()[-1]}); restart the runtime and "
      "run this cell again."
    )
  if (backend := done.stdout.split()[-1]) != kind:
    raise Stop(
      f"This runtime has {_NAMES[kind]}, but JAX runs on {backend}: restart the runtime, run this "
      f"cell again, and read what pip "
      "says if it stays so."
    )


def run(*arguments, accept=(0,), until=None):
  """`python arguments...` in this clone, its output shown line by line -> its exit status.

  until: text of a line behind which the process gets SIGTERM, as one whose machine is taken away.

  Raises:
    Stop: another status than those of `accept`.
  """
  command = [sys.executable, *map(str, arguments)]
  process = subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, bufsize=1
  )
  for line in process.stdout:
    print(line, end="", flush=True)
    if until and until in line:
      process.terminate()
      until = None
  if process.wait() not in accept:
    raise Stop(
      f"`python {' '.join(command[1:])}` ended with status {process.returncode}; its last lines "
      f"say why."
    )
  return process.returncode


def show(image):
  """Shows a picture below the cell.

  Nothing outside of Jupyter. image: path of a PNG, or u8[H, W, 3].
  """
  from PIL import Image

  picture = Image.open(image) if isinstance(image, str | os.PathLike) else Image.fromarray(image)
  if "IPython" in sys.modules:
    from IPython.display import display

    display(picture)
  return picture.size


def photographs(folder, names):
  """Photographs that scikit-image carries, all public domain or CC0, as PNGs in `folder` -> {name: path}."""
  import numpy as np
  from PIL import Image
  from skimage import data

  os.makedirs(folder, exist_ok=True)
  paths = {name: os.path.join(folder, f"{name}.png") for name in names}
  for name, path in paths.items():
    Image.fromarray(np.asarray(getattr(data, name)())).convert("RGB").save(path)
  return paths
