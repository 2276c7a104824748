"""The checks of CONTRIBUTING.md: format, lint, import layers, types, documentation."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.support.paths import ROOT


@pytest.mark.parametrize(
  "command",
  ["ruff format --check .", "ruff check .", "lint-imports", "pyright", "mkdocs build -q --strict"],
)
def test_check_passes(command, tmp_path):
  arguments = command.split()
  if arguments[0] == "mkdocs":
    arguments += ["--site-dir", str(tmp_path)]
  programs = pathlib.Path(sys.executable).parent  # of this environment, activated or not
  check = subprocess.run(
    arguments,
    cwd=ROOT,
    env=os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  assert check.returncode == 0, check.stdout
