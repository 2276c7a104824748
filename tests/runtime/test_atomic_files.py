"""Whole files or none."""

import json
import os
import subprocess
import sys

import pytest

from mplug_jax.runtime import atomic_files
from tests.support import paths


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
  path = tmp_path / "file"
  atomic_files.write_atomic(path, b"old")
  with pytest.raises(TypeError):
    atomic_files.write_atomic(path, "not bytes")
  assert path.read_bytes() == b"old"
  assert os.listdir(tmp_path) == ["file"]
  with pytest.raises(FileNotFoundError):
    atomic_files.write_atomic(tmp_path / "absent" / "file", b"x")


def test_atomic_write_on_a_full_disk(tmp_path):
  atomic_files.write_atomic(tmp_path / "file", b"old")
  code = (
    "import resource, signal; from mplug_jax.runtime import atomic_files as files\n"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
    f"files.write_atomic({str(tmp_path / 'file')!r}, bytes(100_000))"
  )
  root = paths.ROOT
  run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
  assert run.returncode
  assert "File too large" in run.stderr
  assert (tmp_path / "file").read_bytes() == b"old"
  assert os.listdir(tmp_path) == ["file"]


def test_write_json_replaces_whole_files(tmp_path):
  path = tmp_path / "config.json"
  atomic_files.write_json(path, {"a": [1, 2.5, None, "é"]})
  assert json.loads(path.read_text()) == {"a": [1, 2.5, None, "é"]}
  with pytest.raises(TypeError):
    atomic_files.write_json(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": [1, 2.5, None, "é"]}
  assert [p.name for p in path.parent.iterdir()] == ["config.json"]
