"""Checkpoints of the released sizes keep every byte, in a fraction of the model's memory.

`python -m pytest -s -m slow tests/test_released_size.py` takes minutes and 13 GB of disk, and
prints times beside those of reading and writing the same bytes. Memory is the process's own
high-water mark (VmHWM: the interpreter and JAX included, the page cache not) and ru_maxrss, which a
process inherits from the one that started it if that was larger.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from mplug_jax.conversion import mapping, official_inventory
from mplug_jax.conversion.geometry import infer_geometry
from mplug_jax.tensor_files import open as torch_files
from mplug_jax.tensor_files import write
from tests.support.paths import ROOT

# A length that no row of a tensor divides: no two rows, layers or tensors are alike.
BLOCK = np.random.default_rng(0).integers(0, 256, (1 << 24) + 43, np.uint8)
TOOL = """
import re, runpy, sys
sys.argv = sys.argv[1:]
try:
  runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
  print("VmHWM", re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def official(name):
  with gzip.open(ROOT / "tests" / "golden" / "state_dicts.json.gz") as file:
    return {
      key: official_inventory.Tensor(tuple(shape), dtype)
      for key, (shape, dtype) in json.load(file)[name].items()
    }


def expected(name, tensor):
  """Returns the value of a tensor: random bytes that depend on its name."""
  if tensor.dtype != "float32":
    return official_inventory.constant(name, tensor)
  nbytes = 4 * int(np.prod(tensor.shape))
  start = zlib.crc32(name.encode()) % len(BLOCK)
  return np.resize(BLOCK, start + nbytes)[start:].copy().view(np.float32).reshape(tensor.shape)


def tied(name):
  """The tensor whose storage this one shares in the official checkpoints, or ""."""
  head, _, rest = name.partition(".cls.predictions.decoder.")
  return {
    "weight": f"{head}.bert.embeddings.word_embeddings.weight",
    "bias": f"{head}.cls.predictions.bias",
  }.get(rest, "")


def write_source(path, tensors):
  write.save_pth(
    path,
    [
      write.Tensor(name, x.shape, x.dtype, lambda name=name, x=x: expected(name, x), tied(name))
      for name, x in tensors.items()
    ],
  )


def run(module, *args):
  """Runs a command; returns (seconds, CPU seconds, bytes of VmHWM, bytes of ru_maxrss)."""
  start = time.perf_counter()
  process = subprocess.Popen(
    [sys.executable, "-c", TOOL, module, *map(str, args)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  out = process.stdout.read()
  _, status, usage = os.wait4(process.pid, 0)
  assert os.waitstatus_to_exitcode(status) == 0, out
  return (
    time.perf_counter() - start,
    usage.ru_utime + usage.ru_stime,
    int(out.rsplit("VmHWM", 1)[1]) * 1024,
    usage.ru_maxrss * 1024,
  )


def files(path):
  return [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]


def size(path):
  return sum(p.stat().st_size for p in files(path))


def copy_seconds(source, nbytes, scratch):
  """Reads a path, writes a number of bytes to disk; returns (seconds, CPU seconds)."""
  start = time.perf_counter()
  cpu = time.process_time()
  chunk = memoryview(bytearray(1 << 24))
  for path in files(source):
    with open(path, "rb", buffering=0) as file:
      while file.readinto(chunk):
        pass
  with open(scratch, "wb", buffering=0) as file:
    for at in range(0, nbytes, len(chunk)):
      file.write(chunk[: nbytes - at])
    os.fsync(file.fileno())
  seconds = time.perf_counter() - start, time.process_time() - cpu
  scratch.unlink()
  return seconds


def report(what, measured, copy, model):
  seconds, cpu, hwm, maxrss = measured
  print(
    f"{what}: {seconds:.1f} s ({cpu:.1f} s of CPU), reading and writing the bytes {copy[0]:.1f} s "
    f"({copy[1]:.1f} s), ratio "
    f"{seconds / copy[0]:.2f}; VmHWM {hwm / 1e9:.2f} GB, ru_maxrss {maxrss / 1e9:.2f} GB; VmHWM / "
    f"model {hwm / model:.2f}"
  )
  assert hwm <= 1.3 * model


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "ending"),
  [
    ("vqa_base", ""),
    ("vqa_base", ".safetensors"),
    ("vqa_large", ""),
    ("vqa_large", ".safetensors"),
  ],
)
def test_released_size_there_and_back(name, ending, tmp_path):
  tensors = official(name)
  entries = [entry for m in (False, True) for entry in planned(tensors, m)]
  model = 4 * sum(int(np.prod(shape)) for shape, entry in entries if entry.action == "map")
  source = tmp_path / "official.pth"
  converted = tmp_path / f"ours{ending}"
  back = tmp_path / "back.pth"
  scratch = tmp_path / "scratch"
  write_source(source, tensors)
  baseline = run("tools.convert_checkpoint", "--help")[2]
  measured = run("tools.convert_checkpoint", source, converted, "--keep_dead")
  print(
    f"\n{name}{ending}: source {size(source) / 1e9:.2f} GB, result {size(converted) / 1e9:.2f} GB "
    f"(model {model / 1e9:.2f} GB); VmHWM of the tool's --help {baseline / 1e9:.2f} GB"
  )
  report("convert", measured, copy_seconds(source, size(converted), scratch), model)
  expected_size = size(source)
  source.unlink()
  measured = run("tools.export_torch", converted, back)
  report("export", measured, copy_seconds(converted, size(back), scratch), model)
  shutil.rmtree(converted) if converted.is_dir() else converted.unlink()
  assert size(back) == expected_size
  with torch_files.open_tensors(back) as file:
    assert set(file) == set(tensors)
    for key, tensor in tensors.items():
      x = file[key]
      assert (x.shape, str(x.dtype)) == (tensor.shape, tensor.dtype)
      assert x.tobytes() == expected(tied(key) or key, tensor).tobytes(), key
  back.unlink()


def planned(tensors, momentum):
  """[(shape, Entry)] of the online weights or of their momentum copies."""
  names = mapping.online_names(tensors, momentum)
  geometry = infer_geometry(
    {name: tensors[key].shape for name, key in mapping.online_names(tensors).items()}
  )
  plan = mapping.plan({name: tensors[key].shape for name, key in names.items()}, geometry)
  return [(tensors[names[name]].shape, entry) for name, entry in plan.items()]
