"""Values that are NaN or infinite, in conversion, export and inspection."""

import functools
import json
import pathlib
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug_jax.checkpoints import reading
from mplug_jax.conversion import importer, storage
from tests.support.command_errors import refused, refused_conversion
from tests.support.official_state import GIVEN, read, save, state_dict
from tools import convert_checkpoint, export_torch, inspect_checkpoint

FLAGS = [f"--{name}={value}" for name, value in GIVEN.items()]
WEIGHT = "text_decoder.bert.encoder.layer.1.intermediate.dense.weight"
BIAS = "text_decoder.bert.encoder.layer.0.output.dense.bias"
DEAD = "fusion_encoder.encoder.layer.0.output.dense.bias"


def spoiled(tensors, places, value=np.nan):
  """Returns the tensors with `value` at {key: numbers of elements}."""
  changed = dict(tensors)
  for key, numbers in places.items():
    array = np.array(tensors[key], np.float32)
    array.reshape(-1)[list(numbers)] = value
    changed[key] = array
  return changed


@functools.cache
def whole():
  return state_dict("caption")


@pytest.fixture
def tensors():
  return whole()


@pytest.mark.parametrize("dest", ["ours", "ours.safetensors"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_conversion_refuses_and_names_every_tensor(tensors, dest, value, tmp_path, capsys):
  save(tmp_path / "x.pth", spoiled(tensors, {WEIGHT: range(3), BIAS: [0]}, value))
  refused_conversion(
    capsys,
    tmp_path,
    dest,
    FLAGS,
    (
      f"{tmp_path}/x.pth: 4 values of 2 tensors are not finite",
      f"{WEIGHT} (3)",
      f"{BIAS} (1)",
      "--allow_nonfinite",
    ),
  )


@pytest.mark.parametrize("dest", ["ours", "ours.safetensors"])
def test_they_are_converted_and_named_if_allowed(tensors, dest, tmp_path, capsys):
  save(tmp_path / "x.pth", spoiled(tensors, {WEIGHT: range(3)}))
  source = [str(tmp_path / "x.pth"), str(tmp_path / dest)]
  assert convert_checkpoint.main([*source, *FLAGS, "--allow_nonfinite"]) == 0
  assert capsys.readouterr().err == (
    f"warning: 3 values of 1 tensor are not finite: {WEIGHT} (3).\n"
  )
  description = storage.read_description(tmp_path / dest)
  assert description[1]["nonfinite"] == {WEIGHT: 3}
  leaves = reading.load_arrays(tmp_path / dest, "params")
  assert sum(np.count_nonzero(~np.isfinite(x)) for x in leaves.values()) == 3
  refused(
    capsys,
    tmp_path,
    export_torch.main,
    tmp_path / dest,
    tmp_path / "back.pth",
    messages=(f"3 values of 1 tensor are not finite: {WEIGHT} (3)", "--allow_nonfinite"),
  )
  assert export_torch.main([source[1], str(tmp_path / "back.pth"), "--allow_nonfinite"]) == 0
  assert np.isnan(read(tmp_path / "back.pth")[WEIGHT]).sum() == 3
  capsys.readouterr()
  assert inspect_checkpoint.main([source[1]]) == 0
  assert "!! 3 numbers in 1 leaves are not finite:" in capsys.readouterr().out


def test_whole_weights_have_no_such_entry(tensors, tmp_path):
  manifest = importer.convert_checkpoint(
    save(tmp_path / "x.pth", tensors), tmp_path / "ours", allow_nonfinite=True, **GIVEN
  )
  assert "nonfinite" not in manifest
  assert "nonfinite" not in json.loads((tmp_path / "ours" / "manifest.json").read_text())


def test_tensors_that_never_run_are_harmless(tensors, tmp_path):
  path = save(tmp_path / "x.pth", spoiled(tensors, {DEAD: [0]}))
  importer.convert_checkpoint(path, tmp_path / "ours", keep_dead=True, **GIVEN)
  assert export_torch.main([str(tmp_path / "ours"), str(tmp_path / "back.pth")]) == 0


def test_numbers_too_large_for_float16_are_refused(tensors, tmp_path):
  path = save(tmp_path / "x.pth", spoiled(tensors, {WEIGHT: [0]}, 1e30))
  message = "values of params/text_decoder/layers/intermediate.* are too large for float16"
  with pytest.raises(ValueError, match=message):
    importer.convert_checkpoint(path, tmp_path / "ours", dtype="float16", **GIVEN)
  assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
  st.dictionaries(
    st.sampled_from(sorted(key for key in whole() if key.startswith("text_decoder.bert.encoder"))),
    st.sets(st.integers(0, 7), min_size=1),
    min_size=1,
    max_size=4,
  )
)
def test_any_tensors_are_named_with_their_counts(places):
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    path = save(folder / "x.pth", spoiled(whole(), places))
    with pytest.raises(ValueError, match="not finite") as error:
      importer.convert_checkpoint(path, folder / "ours", **GIVEN)
    assert [p.name for p in folder.iterdir()] == ["x.pth"]
  for key, numbers in places.items():
    assert f"{key} ({len(numbers)})" in str(error.value)
