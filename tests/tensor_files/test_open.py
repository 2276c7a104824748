"""Damaged and foreign files, folders: one sentence says what is wrong."""

import json
import os
import pickle
import struct
import sys
import zipfile

import pytest

from mplug_jax.tensor_files import torch_archive
from mplug_jax.tensor_files.open import open_tensors
from mplug_jax.tensor_files.write import save_pth, save_safetensors
from tests.support.torch_pickles import archive, floats, program, refused, same, tensor


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"", "an empty file"),
    (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG image"),
    (b"\xff\xd8\xff\xe0" + bytes(9), "a JPEG image"),
    (b"\n<!DOCTYPE html><html>Sign in</html>", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
    (b"\x1f\x8b\x08" + bytes(50), "gzip"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (pickle.dumps({"a": 1}), "torch.save did not write"),
    (b"hello", "not a PyTorch checkpoint"),
    (bytes(1000), "not a PyTorch checkpoint"),
  ],
)
def test_foreign_files(data, message, tmp_path):
  (tmp_path / "model.pth").write_bytes(data)
  refused(lambda: open_tensors(tmp_path / "model.pth"), str(tmp_path / "model.pth"), message)


def test_a_missing_file(tmp_path):
  refused(
    lambda: open_tensors(tmp_path / "model.pth"),
    str(tmp_path / "model.pth"),
    kind=FileNotFoundError,
  )


@pytest.mark.parametrize("save", [save_pth, save_safetensors])
def test_a_truncated_file(save, tmp_path):
  path = tmp_path / "file"
  save(path, {"a": floats(100), "b": floats(10_000, 30)})
  data = path.read_bytes()
  for keep in (9, 64, 300, 900, len(data) - 1):
    path.write_bytes(data[:keep])
    refused(lambda: open_tensors(path), str(path), "damaged")
  path.write_bytes(data)
  file = open_tensors(path)
  os.truncate(path, 100_000)  # while it is open
  assert "b" in file
  assert file.shape("b") == (10_000, 30)
  refused(lambda: file["b"], "tensor 'b'", "the file ends inside")


def test_damaged_archives(tmp_path):
  state = {"w": tensor("0", (3,))}
  refused(
    lambda: open_tensors(archive(tmp_path / "big", state, {"0": floats(3)}, byteorder=b"big")),
    "byte order",
    "big",
  )
  with zipfile.ZipFile(tmp_path / "npz", "w") as file:
    file.writestr("a.npy", b"x")
  refused(lambda: open_tensors(tmp_path / "npz"), "no data.pkl")
  for data in (
    b"",
    b"\x80\x02}",
    b"\x80\x02\xff.",
    b"garbage",
    b"\x80\x02(((((e.",
    b"\x80\x02\x82\x01.",
    b"\x80\x02cos\nsystem",
    b"\x80\x02}r\xff\xff\xff\x3f.",
    b"}p1073741823\n.",
  ):  # the last two would take 16 GiB
    with zipfile.ZipFile(tmp_path / "pickle", "w") as file:
      file.writestr("archive/data.pkl", data)
    refused(lambda: open_tensors(tmp_path / "pickle"), "pickle cannot be read")
  with zipfile.ZipFile(tmp_path / "two", "w") as file:
    for prefix in ("a", "b"):
      file.writestr(f"{prefix}/data.pkl", program(state))
  refused(lambda: open_tensors(tmp_path / "two"), "2 data.pkl")


def test_damage_found_while_reading(tmp_path):
  state = {"w": tensor("0", (500,))}
  x = floats(500)
  path = archive(tmp_path / "packed", state, {"0": x}, zipfile.ZIP_DEFLATED)
  data = bytearray(path.read_bytes())
  at = zipfile.ZipFile(path).getinfo("archive/data/0").header_offset
  data[at + 100 : at + 400] = b"\xff" * 300
  path.write_bytes(data)
  refused(lambda: open_tensors(path)["w"], "tensor 'w'", "cannot be unpacked")
  path = archive(tmp_path / "stored", state, {"0": x})
  data = bytearray(path.read_bytes())
  at = zipfile.ZipFile(path).getinfo("archive/data/0").header_offset
  data[at : at + 4] = b"XXXX"
  path.write_bytes(data)
  refused(lambda: open_tensors(path)["w"], "archive/data/0 is not where the archive says")
  at = data.index(
    b"PK\x01\x02"
  )  # the directory, whose entry of data.pkl gets a place beyond the file
  data[at + 42 : at + 46] = b"\xff\xff\xff\x7f"
  path.write_bytes(data)
  refused(lambda: open_tensors(path), "archive/data.pkl is not inside the file")


def test_a_pickle_too_large_for_a_checkpoint(tmp_path, monkeypatch):
  monkeypatch.setattr(torch_archive, "_MAX_PICKLE", 100)
  refused(
    lambda: open_tensors(archive(tmp_path / "file", {"x" * 200: 1}, {}, zipfile.ZIP_DEFLATED)),
    "more than any checkpoint has",
  )


GOOD = {
  "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
  "b": {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]},
}


def safetensors(path, header, data=bytes(11)):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + data)
  return path


@pytest.mark.parametrize(
  ("header", "messages"),
  [
    ({**GOOD, "b": {**GOOD["b"], "data_offsets": [4, 7]}}, ("'b'", "overlaps")),
    ({**GOOD, "b": {**GOOD["b"], "data_offsets": [9, 12]}}, ("'b'", "ends beyond the file")),
    (
      {**GOOD, "b": {**GOOD["b"], "shape": [4], "data_offsets": [8, 12]}},
      ("'b'", "ends beyond the file"),
    ),
    ({**GOOD, "b": {**GOOD["b"], "shape": [2], "data_offsets": [9, 11]}}, ("'b'", "gap")),
    ({"a": GOOD["a"]}, ("3 bytes belong to no tensor",)),
    ({**GOOD, "a": {**GOOD["a"], "shape": [3]}}, ("'a'", "8 bytes for shape (3,) of float32")),
    ({**GOOD, "a": {**GOOD["a"], "dtype": "F4"}}, ("'a'", "dtype 'F4' is not supported")),
    ({**GOOD, "a": {**GOOD["a"], "dtype": ["F32"]}}, ("'a'", "is not supported")),
    ({**GOOD, "a": {**GOOD["a"], "shape": [-2]}}, ("'a'", "no valid shape")),
    ({**GOOD, "a": {**GOOD["a"], "shape": [2.0]}}, ("'a'", "no valid shape")),
    ({**GOOD, "a": {**GOOD["a"], "shape": [0, 1 << 62]}}, ("'a'", "no valid shape")),
    ({**GOOD, "a": {**GOOD["a"], "shape": [1] * 65}}, ("'a'", "no valid shape")),
    ({**GOOD, "a": {**GOOD["a"], "data_offsets": [8, 0]}}, ("'a'", "-8 bytes")),
    ({**GOOD, "a": {"dtype": "F32"}}, ("'a'", "no valid shape")),
    ({**GOOD, "a": 3}, ("'a'", "no valid shape")),
    (b"{not json}", ("header cannot be read",)),
    (b'{"a": \xff}', ("header cannot be read",)),
    (b'{"a": 1, "a": 2}', ("a name occurs twice",)),
    ({"__metadata__": 3}, ("__metadata__",)),
  ],
)
def test_damaged_safetensors(header, messages, tmp_path):
  with open_tensors(safetensors(tmp_path / "file", GOOD)) as file:
    assert {key: file.shape(key) for key in file} == {"a": (2,), "b": (3,)}
  path = safetensors(tmp_path / "file", header)
  refused(lambda: open_tensors(path), str(path), *messages)


def test_a_header_longer_than_the_file(tmp_path):
  (tmp_path / "file").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
  refused(lambda: open_tensors(tmp_path / "file"), "header should have 1099511627776 bytes")


# ---- folders


@pytest.mark.parametrize(
  ("file", "save"),
  [
    ("model.safetensors", save_safetensors),
    ("pytorch_model.bin", save_pth),
    ("mp_rank_00_model_states.pt", save_pth),
  ],
)
def test_a_folder_with_one_checkpoint(file, save, tmp_path):
  save(tmp_path / file, {"w": floats(3)})
  (tmp_path / "config.json").write_text("{}")
  same(open_tensors(tmp_path)["w"], floats(3))
  (tmp_path / "model.safetensors.index.json").write_text("{}")
  refused(
    lambda: open_tensors(tmp_path),
    str(tmp_path),
    f"{file} and" if file[:3] == "mod" else f"and {file}",
    "name one of them",
  )


def test_a_folder_without_checkpoint(tmp_path):
  (tmp_path / "latest").write_text("../elsewhere")
  refused(
    lambda: open_tensors(tmp_path),
    str(tmp_path),
    "none of model.safetensors, model.safetensors.index.json, pytorch_model.bin, "
    "pytorch_model.bin.index.json, mp_rank_00_model_states.pt.",
    kind=FileNotFoundError,
  )


def test_a_deepspeed_folder(tmp_path):
  (tmp_path / "latest").write_text("checkpoint-5\n")
  (tmp_path / "checkpoint-5").mkdir()
  save_pth(tmp_path / "checkpoint-5/mp_rank_00_model_states.pt", {"w": floats(3)}, "module")
  with open_tensors(tmp_path) as file:
    same(file["w"], floats(3))
    assert file.wrapper == "module"
  (tmp_path / "checkpoint-5/mp_rank_01_model_states.pt").write_bytes(b"")
  refused(lambda: open_tensors(tmp_path), "split over several mp_rank files")


@pytest.mark.parametrize(
  ("index", "save"),
  [("model.safetensors.index.json", save_safetensors), ("pytorch_model.bin.index.json", save_pth)],
)
def test_shards(index, save, tmp_path):
  def write_index(weight_map):
    (tmp_path / index).write_text(
      json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )

  where = {"b": "part-1", "a": "part-1", "c": "part-2"}
  save(tmp_path / "part-1", {"b": floats(2), "a": floats(3)})
  save(tmp_path / "part-2", {"c": floats(4, 2)})
  write_index(where)
  with open_tensors(tmp_path) as file:
    assert list(file) == ["b", "a", "c"]
    same(file["a"], floats(3))
    same(file["c"], floats(4, 2))
  for differ, changed in (("x", {**where, "x": "part-2"}), ("a", {"b": "part-1", "c": "part-2"})):
    write_index(changed)
    refused(lambda: open_tensors(tmp_path), "part-", "lists other tensors than it has: " + differ)
  write_index({**where, "c": "part-3"})
  refused(lambda: open_tensors(tmp_path), str(tmp_path / "part-3"), kind=FileNotFoundError)
  for bad in ({**where, "c": "../part-2"}, {"c": 3}, ["part-1"]):
    write_index(bad)
    refused(lambda: open_tensors(tmp_path), index, "not an index of shards")


# ---- from before PyTorch 1.6


def test_an_old_file_without_pytorch(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  (tmp_path / "old.pth").write_bytes(
    pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
  )
  refused(
    lambda: open_tensors(tmp_path / "old.pth"),
    "before PyTorch 1.6",
    "pip install 'mplug_jax[convert]'",
    kind=ImportError,
  )
