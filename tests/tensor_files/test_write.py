"""Written checkpoints: exact bits, one tensor in memory at a time, complete files or none."""

import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest

from mplug_jax.tensor_files import write
from mplug_jax.tensor_files.open import open_tensors
from mplug_jax.tensor_files.write import Tensor, save_pth, save_safetensors
from tests.support import paths
from tests.support.torch_pickles import ARRAYS, floats, refused, same


@pytest.mark.parametrize("save", [save_pth, save_safetensors])
def test_round_trip_keeps_every_bit(save, tmp_path):
  save(tmp_path / "file", ARRAYS)
  with open_tensors(tmp_path / "file") as file:
    assert sorted(file) == sorted(ARRAYS)
    assert len(file) == len(ARRAYS)
    if save is save_pth:
      assert list(file) == list(ARRAYS)
      assert file.wrapper == "model"
    for key, array in ARRAYS.items():
      assert key in file
      assert file.shape(key) == array.shape
      assert file.dtype(key) == array.dtype
      same(file[key], np.ascontiguousarray(array).reshape(array.shape))
    assert "absent" not in file
    assert not file.placeholders
    assert not file.ignored
    with pytest.raises(KeyError):
      file["absent"]
    first = file["a.weight"]
    first[:] = 0  # its own memory: another read sees the file
    same(file["a.weight"], ARRAYS["a.weight"])
  with pytest.raises(ValueError, match="closed file"):
    file["a.weight"]


@pytest.mark.parametrize("save", [save_pth, save_safetensors])
def test_one_tensor_in_memory_at_a_time(save, tmp_path):
  size = 1 << 18
  tensors = [
    Tensor(f"{i:02}", (size,), np.float32, lambda i=i: np.full(size, i, np.float32))
    for i in range(16)
  ]
  tracemalloc.start()
  try:
    save(tmp_path / "file", tensors)
    assert tracemalloc.get_traced_memory()[1] < 2.5 * 4 * size
    tracemalloc.reset_peak()
    file = open_tensors(tmp_path / "file")
    assert sum(np.prod(file.shape(key)) for key in file) == 16 * size
    assert tracemalloc.get_traced_memory()[1] < size  # nothing read yet
    for i, key in enumerate(file):
      assert file[key][-1] == i
    assert tracemalloc.get_traced_memory()[1] < 1.5 * 4 * size
    file.close()
  finally:
    tracemalloc.stop()


def test_tied_tensors_share_their_bytes(tmp_path):
  table = floats(50, 20)
  tensors = [
    Tensor("word", (50, 20), np.float32, lambda: table),
    Tensor("head", (50, 20), np.float32, same_as="word"),
  ]
  save_pth(tmp_path / "tied.pth", tensors)
  save_safetensors(tmp_path / "tied.safetensors", tensors)  # has no sharing: stored twice
  assert os.path.getsize(tmp_path / "tied.pth") < 1.5 * table.nbytes
  for file in map(open_tensors, tmp_path.iterdir()):
    same(file["word"], table)
    same(file["head"], table)
  for bad in (
    dict(same_as="absent"),
    dict(same_as="word", dtype=np.float16),
    dict(same_as="word", shape=(20, 50)),
  ):
    refused(
      lambda bad=bad: save_pth(tmp_path / "bad", [tensors[0], tensors[1]._replace(**bad)]),
      "'head' shares",
    )


def check_alignment(path):
  """Every record starts at a multiple of 64 bytes and has its checksum."""
  data = path.read_bytes()
  with zipfile.ZipFile(path) as file:
    assert file.testzip() is None
    for info in file.infolist():
      lengths = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
      assert (info.header_offset + 30 + sum(lengths)) % 64 == 0


def test_files_are_the_same_bytes_each_time_and_records_are_aligned(tmp_path):
  for i in (0, 1):
    save_pth(tmp_path / f"{i}", ARRAYS, wrapper="")
  assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
  check_alignment(tmp_path / "0")
  with open_tensors(tmp_path / "0") as file:
    assert file.wrapper == ""


def test_records_beyond_the_small_zip_format(tmp_path, monkeypatch):
  monkeypatch.setattr(
    zipfile, "ZIP64_LIMIT", 200
  )  # instead of 2 GiB: sizes and offsets move to the large format
  arrays = {"small": floats(3), "large": floats(100), "last": floats(7)}
  save_pth(tmp_path / "file", arrays)
  monkeypatch.undo()
  with open_tensors(tmp_path / "file") as file:
    for key, array in arrays.items():
      same(file[key], array)
  check_alignment(tmp_path / "file")
  with zipfile.ZipFile(tmp_path / "file") as file:
    assert file.read("archive/data/1") == arrays["large"].tobytes()


@pytest.mark.parametrize("n", [0, 1, (1 << 31) - 1, 1 << 31, 1 << 40])
def test_sizes_beyond_31_bits(n):
  assert pickle.loads(b"\x80\x02" + write._int(n) + b".") == n


def test_metadata_of_safetensors(tmp_path):
  save_safetensors(tmp_path / "file", {"x": np.uint8([1, 2, 3]), "y": floats(2)}, {"format": "pt"})
  with open_tensors(tmp_path / "file") as file:
    assert file.metadata == {"format": "pt"}
    assert list(file) == ["y", "x"]  # larger elements first, so that all are aligned
  assert int.from_bytes((tmp_path / "file").read_bytes()[:8], "little") % 8 == 0
  refused(lambda: save_safetensors(tmp_path / "bad", {}, {"step": 3}), "metadata", "texts")


# ---- complete files or none


def failing(kind):
  def load():
    raise kind("cannot make it")

  return load


@pytest.mark.parametrize("save", [save_pth, save_safetensors])
@pytest.mark.parametrize(
  ("load", "error"),
  [
    (failing(RuntimeError), "cannot make it"),
    (failing(KeyboardInterrupt), "cannot make it"),
    (lambda: np.zeros((2, 3), np.float32), "announced as float32[3, 2]"),
    (lambda: np.zeros((3, 2)), "is float64[3, 2]"),
  ],
)
def test_a_failed_write_leaves_the_old_file(save, load, error, tmp_path):
  path = tmp_path / "file"
  path.write_bytes(b"old")
  with pytest.raises(BaseException, match=error.replace("[", r"\[")):
    save(
      path,
      [
        Tensor("a", (2,), np.float32, lambda: np.ones(2, np.float32)),
        Tensor("b", (3, 2), np.float32, load),
      ],
    )
  assert path.read_bytes() == b"old"
  assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
  code = (
    "import resource, signal, sys, numpy; from mplug_jax.tensor_files import write as torch_write\n"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    "for save in torch_write.save_pth, torch_write.save_safetensors:\n"
    "  try: save('file', {str(i): numpy.ones(9000) for i in range(3)})\n"
    "  except OSError as error: print(error)\n"
  )
  (tmp_path / "file").write_bytes(b"old")
  environment = {**os.environ, "PYTHONPATH": str(paths.ROOT)}
  run = subprocess.run(
    [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment
  )
  assert run.returncode == 0, run.stderr
  assert run.stdout.splitlines() == ["[Errno 27] File too large: 'file'"] * 2, run.stderr
  assert run.stderr == ""
  assert (tmp_path / "file").read_bytes() == b"old"
  assert os.listdir(tmp_path) == ["file"]


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
  one = Tensor("a", (1,), np.float32, lambda: np.ones(1, np.float32))
  for save in (save_pth, save_safetensors):
    refused(lambda save=save: save(tmp_path / "file", [one, one]), "tensor 'a' is given twice")
    refused(
      lambda save=save: save(tmp_path / "file", {"t": np.array(["text"])}), "tensor 't'", "float32"
    )
  refused(
    lambda: save_pth(tmp_path / "file", {"u": np.uint16([1])}), "dtype uint16 cannot be stored"
  )
  refused(
    lambda: save_safetensors(tmp_path / "file", {"__metadata__": np.uint8([1])}), "__metadata__"
  )
  assert not os.listdir(tmp_path)
