"""Helpers of the notebooks: installation, commands with their output, images; imports no JAX.

With MPLUG_NOTEBOOK_TINY=1 the cells use the tiny preset and install nothing, as the tests do.
MPLUG_NOTEBOOK_RUNS is the folder for results.
"""

import importlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Collection, Iterable
from typing import Any

from mplug_jax.runtime.accelerators import unused_accelerator

TINY = bool(os.environ.get("MPLUG_NOTEBOOK_TINY"))
ROOT = pathlib.Path(__file__).resolve().parent.parent
# Folder for the results of cells.
RUNS = pathlib.Path(os.environ.get("MPLUG_NOTEBOOK_RUNS") or ROOT / "runs" / "notebook")
_NAMES = {"tpu": "a TPU", "gpu": "a GPU", "cpu": "a CPU only"}
_EXTRAS = {"tpu": ("tpu",), "gpu": ("cuda",), "cpu": ()}


class Stop(Exception):
  """Ends a notebook with one sentence, which Jupyter shows instead of a traceback."""

  def _render_traceback_(self) -> list[str]:
    return [f"stopped: {self}"]


def setup(*extras: str) -> str:
  """Installs this clone for the runtime and makes it the current folder.

  Args:
    *extras: extras of the package to install.

  Returns:
    "tpu", "gpu" or "cpu".

  Raises:
    Stop: JAX's backend is not what the runtime offers, or the installation failed.
  """
  os.chdir(ROOT)
  kind = unused_accelerator("cpu") or "cpu"
  if not TINY:
    names = ",".join((*extras, *_EXTRAS[kind]))
    run("-m", "pip", "install", "--quiet", "-e", f".[{names}]" if names else ".")
    importlib.invalidate_caches()  # so that this process finds the new packages
  check(kind)
  print(f"This runtime has {_NAMES[kind]}, and JAX uses it.")
  return kind


def check(kind: str) -> None:
  """Checks in another process that JAX runs on a kind of device.

  In this process JAX would occupy the device, and the trainings that cells start could not use it.

  Args:
    kind: "tpu", "gpu" or "cpu".

  Raises:
    Stop: JAX runs on another device or does not start; the message says what to do.
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
      f"({done.stderr.strip().splitlines()[-1]}); restart the runtime and run this cell again."
    )
  if (backend := done.stdout.split()[-1]) != kind:
    raise Stop(
      f"This runtime has {_NAMES[kind]}, but JAX runs on {backend}; restart the runtime and run "
      "this cell again. If that does not help, read the messages of pip."
    )


def run(*arguments: Any, accept: Collection[int] = (0,), until: str | None = None) -> int:
  """Runs `python ARGUMENTS...` in this clone and prints its output line by line.

  Args:
    *arguments: arguments of the command.
    accept: exit statuses that are no failure.
    until: text in a line after which the process gets SIGTERM, as on a preempted machine.

  Returns:
    The exit status.

  Raises:
    Stop: the command ended with another status.
  """
  command = [sys.executable, *map(str, arguments)]
  process = subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, bufsize=1
  )
  assert process.stdout is not None
  for line in process.stdout:
    print(line, end="", flush=True)
    if until and until in line:
      process.terminate()
      until = None
  if process.wait() not in accept:
    raise Stop(
      f"`python {' '.join(command[1:])}` ended with status {process.returncode}; its last lines "
      "say why."
    )
  return process.returncode


def show(image: Any) -> tuple[int, int]:
  """Shows an image below the cell, in Jupyter only.

  Args:
    image: path of an image file, or array u8[H, W, 3].

  Returns:
    Its width and height.
  """
  from PIL import Image

  picture = Image.open(image) if isinstance(image, str | os.PathLike) else Image.fromarray(image)
  if "IPython" in sys.modules:
    # Part of Jupyter, not a dependency of this package.
    from IPython.display import display  # pyright: ignore[reportMissingImports]

    display(picture)
  return picture.size


def photographs(folder: str | os.PathLike, names: Iterable[str]) -> dict[str, str]:
  """Writes photographs of scikit-image, all public domain or CC0, as PNG files.

  Args:
    folder: created if missing.
    names: functions of skimage.data.

  Returns:
    {name: path}.
  """
  import numpy as np
  from PIL import Image
  from skimage import data

  os.makedirs(folder, exist_ok=True)
  paths = {name: os.path.join(folder, f"{name}.png") for name in names}
  for name, path in paths.items():
    Image.fromarray(np.asarray(getattr(data, name)())).convert("RGB").save(path)
  return paths
