"""All cells of each notebook with the tiny preset, and errors.

Cells and their commands run in the test process, where commands with equal configs share programs.
"""

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import pytest
from absl.testing import flagsaver

from mplug_jax import notebook
from tests.support import tiny_run

pytestmark = pytest.mark.usefixtures("drawn_start")

NAMES = sorted(path.stem for path in (tiny_run.ROOT / "notebooks").glob("*.ipynb"))


def cells(name):
  content = json.loads((tiny_run.ROOT / "notebooks" / f"{name}.ipynb").read_text())
  assert content["nbformat"] == 4
  return content["cells"]


def code(name):
  return ["".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "code"]


# The notebooks are tested here, not the model.
_SHALLOW = ("--config.model.vision_layers=1", "--config.model.fusion_layers=1")


class _Output(io.StringIO):
  """Collects text; sends this process SIGTERM when a line holds `until`."""

  until = None

  def write(self, text):
    if self.until and self.until in text:
      self.until = None
      os.kill(os.getpid(), signal.SIGTERM)
    return super().write(text)


def _run_command(module, *arguments):
  """Returns the exit status of `python -m MODULE ARGUMENTS...`, run in this process."""
  command = importlib.import_module(module)
  arguments = list(map(str, arguments))
  try:
    if module not in ("mplug_jax.main", "mplug_jax.doctor"):
      return command.main(arguments)
    from mplug_jax import main

    arguments = [module, *arguments, "--config.compilation_cache=", *_SHALLOW]
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
      patch.setattr(sys, "argv", arguments)  # ml_collections reads it too
      main.parse_flags(arguments)
      command.main([])
  except SystemExit as stop:
    return stop.code or 0
  return 0


@pytest.fixture(scope="module")
def execute():
  """Returns a function that runs the code cells of a notebook here and returns what they print."""
  with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
    patch.setattr(notebook, "TINY", True)
    patch.setattr(sys, "path", [*sys.path])
    patch.setattr(sys, "unraisablehook", sys.unraisablehook)
    minimum = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    stack.callback(jax.config.update, "jax_persistent_cache_min_compile_time_secs", minimum)

    run_in_a_process = notebook.run

    def run_cells(name, folder):
      output, checked = _Output(), []

      def run(flag, module, *arguments, accept=(0,), until=None):
        assert flag == "-m"
        if module == "tools.compile_tpu":  # it changes the environment
          return run_in_a_process(flag, module, *arguments, accept=accept)
        output.until = until
        status = _run_command(module, *arguments)
        assert status in accept, output.getvalue()[-3000:]
        return status

      patch.chdir(tiny_run.ROOT / "notebooks")
      patch.setattr(notebook, "RUNS", folder)
      patch.setattr(notebook, "run", run)
      patch.setattr(notebook, "check", checked.append)
      space = {}
      with contextlib.redirect_stdout(output):
        for text in code(name):
          exec(compile(text, "cell", "exec"), space)
      assert checked == ["cpu"]
      return output.getvalue()

    yield run_cells


def test_notebooks_carry_no_outputs_and_begin_alike():
  assert NAMES == ["ask", "fine_tune", "pod", "weights"]
  first = {re.sub(r"setup\(.*?\)", "setup()", code(name)[0]) for name in NAMES}
  assert len(first) == 1
  assert "notebook.setup()" in first.pop()
  for name in NAMES:
    assert not any(
      cell["outputs"] or cell["execution_count"]
      for cell in cells(name)
      if cell["cell_type"] == "code"
    )
    for text in code(name):
      compile(text, name, "exec")


def test_the_first_cell_stops_where_there_is_no_clone(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", code("ask")[0]], capture_output=True, text=True, cwd=tmp_path
  )
  assert done.returncode == 1
  assert done.stderr.splitlines() == [
    "This runtime has no clone of the repository: set REPOSITORY to its URL."
  ]


def test_a_backend_that_is_not_the_runtimes_is_one_sentence(capfd):
  with pytest.raises(notebook.Stop, match="has a TPU, but JAX runs on cpu") as stopped:
    notebook.check("tpu")
  assert stopped.value._render_traceback_() == [f"stopped: {stopped.value}"]  # what Jupyter shows
  notebook.check("cpu")
  with pytest.raises(notebook.Stop, match="ended with status 3"):
    notebook.run("-c", "print('one line', flush=True); raise SystemExit(3)")
  assert notebook.run("-c", "raise SystemExit(3)", accept=(0, 3)) == 3
  waits = (
    "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(5)); print('ready', "
    "flush=True); time.sleep(60)"
  )
  assert notebook.run("-c", waits, accept=(5,), until="ready") == 5
  assert "one line\n" in capfd.readouterr().out


@pytest.fixture(scope="module")
def pod(execute, tmp_path_factory):
  """(output of the cells of the notebook `pod`, its folder with a pre-trained model)."""
  folder = tmp_path_factory.mktemp("pod")
  return execute("pod", folder), folder


def test_pod(pod):
  out, _ = pod
  stopped = r"stopped with a checkpoint of update [1-5], then trained to update 6"
  assert re.search(stopped, out), out[-2000:]


def test_ask(execute, pod, tmp_path):
  """With the run of the other notebook, which its own command finds finished."""
  shutil.copytree(pod[1] / "pod", tmp_path / "pretrain")
  out = execute("ask", tmp_path)
  assert f"{tmp_path / 'pretrain'} holds a finished run of 6 steps" in out
  assert "['answer', 'caption', 'match', 'embed']" in out
  assert "Box(x0=" in out


def test_fine_tune(execute, tmp_path):
  assert "(ground truth: an astronaut)" in execute("fine_tune", tmp_path)
  assert (tmp_path / "fine_tuned" / "attention.png").exists()


def test_weights(execute, tmp_path):
  assert "The answers and their scores are equal." in execute("weights", tmp_path)


def test_settings_come_from_the_environment(tmp_path):
  program = "from mplug_jax import notebook; print(notebook.TINY, notebook.RUNS)"
  environment = {"MPLUG_NOTEBOOK_TINY": "1", "MPLUG_NOTEBOOK_RUNS": str(tmp_path)}
  done = subprocess.run(
    [sys.executable, "-c", program],
    capture_output=True,
    text=True,
    cwd=tiny_run.ROOT,
    env=os.environ | environment,
  )
  assert done.stdout.split() == ["True", str(tmp_path)]
