"""The notebooks: every cell of each, in its tiny form, as a program of its own; and what stops them."""

import json
import os
import subprocess
import sys

import pytest
import tiny_run


NAMES = sorted(path.stem for path in (tiny_run.ROOT / "notebooks").glob("*.ipynb"))


def cells(name):
  content = json.loads((tiny_run.ROOT / "notebooks" / f"{name}.ipynb").read_text())
  assert content["nbformat"] == 4
  return content["cells"]


def execute(name, tmp_path):
  """Runs the code cells one after another in one process -> what they print."""
  code = ["".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "code"]
  program = "import json, sys\nspace = {}\nfor text in json.load(sys.stdin):\n  exec(compile(text, 'cell', 'exec'), space)"
  done = subprocess.run(
      [sys.executable, "-c", program], input=json.dumps(code), capture_output=True, text=True, cwd=tiny_run.ROOT / "notebooks", timeout=600,
      env=os.environ | {"MPLUG_NOTEBOOK_TINY": "1", "PYTHONPATH": str(tiny_run.ROOT), "MPLUG_NOTEBOOK_RUNS": str(tmp_path)})
  assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
  return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_carry_no_outputs_and_begin_alike(name):
  code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
  assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
  def first(name):
    return [line for line in next(c for c in cells(name) if c["cell_type"] == "code")["source"] if "notebook.setup" not in line]
  assert first(name) == first(NAMES[0])


@pytest.mark.slow
def test_pod(tmp_path):
  pytest.importorskip("tools.compile_tpu")
  assert "updates logged" in execute("pod", tmp_path)
