"""The wheel: what it contains, and that its commands work outside a clone."""

import os
import pathlib
import subprocess
import sys
import venv
import zipfile

import pytest

import mplug_jax
from tests.support.paths import ROOT

COMMANDS = (
  "mplug_jax.main",
  "mplug_jax.predict",
  "mplug_jax.demo",
  "mplug_jax.doctor",
  *(f"tools.{path.stem}" for path in sorted((ROOT / "tools").glob("[!_]*.py"))),
)
LIBRARIES = ("tools.benchmark_loader", "tools.benchmark_report")  # parts of tools.benchmark


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The wheel of this tree, built without network by the setuptools that is installed."""
  source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
  for name in ("mplug_jax", "configs", "tools", "pyproject.toml", "setup.py", "README.md"):
    os.symlink(ROOT / name, source / name)
  os.symlink(ROOT / "LICENSE", source / "LICENSE")
  subprocess.run(
    [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source],
    check=True,
    capture_output=True,
  )
  (path,) = out.glob("*.whl")
  return path


def run(python, *arguments, cwd, **environment):
  return subprocess.run(
    [python, *arguments],
    cwd=cwd,
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
  )


def test_wheel_holds_package_configs_and_tools(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  assert wheel.name == f"mplug_jax-{mplug_jax.__version__}-py3-none-any.whl"
  assert "mplug_jax/py.typed" in names
  for package in ("mplug_jax", "configs", "tools"):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
    assert modules <= names
  assert not any(name.startswith(("tests/", "docs/", "notebooks/")) for name in names)


def test_metadata_names_core_dependencies_and_extras(wheel):
  archive = zipfile.ZipFile(wheel)
  (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
  lines = archive.read(name).decode().splitlines()
  extras = {line.removeprefix("Provides-Extra: ") for line in lines if "Provides-Extra" in line}
  expected = "cpu cuda cuda13 tpu dev test convert eval video export demo notebooks docs gcs"
  assert extras == set(expected.split())
  core = "\n".join(line for line in lines if "Requires-Dist" in line and "extra ==" not in line)
  for package in ("jax>=", "flax>=", "jaxtyping>=", "tqdm>=", "etils[epath]>="):
    assert f"Requires-Dist: {package}" in core


def test_packaged_config_is_found_outside_a_clone(wheel, tmp_path):
  zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
  (tmp_path / "elsewhere").mkdir()
  result = run(
    sys.executable,
    *("-m", "mplug_jax.main", "--config=nlvr2:tiny", "--print_config"),
    cwd=tmp_path / "elsewhere",
    PYTHONPATH=str(tmp_path / "installed"),
  )
  assert result.returncode == 0, result.stderr
  assert '"name": "nlvr2"' in result.stdout


@pytest.mark.slow  # installs everything into an environment of its own
def test_installed_wheel_trains_predicts_and_converts(wheel, tmp_path):
  venv.create(tmp_path / "venv", with_pip=True)
  python = tmp_path / "venv" / "bin" / "python"
  work = tmp_path / "work"
  work.mkdir()

  def check(*arguments):
    result = run(python, *arguments, cwd=work, PYTHONPATH="")
    assert result.returncode == 0, (arguments, result.stderr)
    return result.stdout

  check("-m", "pip", "install", "-q", str(wheel))
  location = check("-c", "import mplug_jax; print(mplug_jax.__file__)").strip()
  assert pathlib.Path(location).is_relative_to(tmp_path / "venv")
  for command in COMMANDS:
    if command not in LIBRARIES:
      assert "--" in run(python, "-m", command, "--help", cwd=work, PYTHONPATH="").stdout, command
  printed = check("-m", "mplug_jax.main", "--config=vqa:tiny", "--workdir=run")
  assert printed.splitlines()[-1].startswith("final: accuracy ")
  answer = check(
    *("-m", "mplug_jax.predict", "--checkpoint=run", "--task=vqa"),
    *(f"--image={ROOT / 'docs' / 'scene.png'}", "--question=what color is the star?"),
  )
  assert answer.strip()
  check("-m", "tools.export_torch", "run", "run.safetensors", "--slim")
  sizes = ("--heads=2", "--vision_heads=1", "--stride=1", "--text_layers=1", "--fusion_layers=2")
  assert "manifest" in check("-m", "tools.convert_checkpoint", "run.safetensors", "back", *sizes)
