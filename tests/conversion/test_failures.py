"""Failed conversions and exports name every mistake and leave nothing behind."""

import numpy as np
import pytest

from mplug_jax.conversion import exporter, importer, official_inventory
from tests.support.official_state import GIVEN, save, state_dict


def refused(tensors, tmp_path, message, **options):
  path = save(tmp_path / "bad.pth", tensors)
  with pytest.raises(ValueError, match=message):
    importer.convert_checkpoint(path, tmp_path / "ours", **GIVEN | options)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.pth"]


def test_mistakes_are_counted_and_grouped(tmp_path):
  tensors = state_dict("caption")
  key = "text_decoder.bert.encoder.layer.1.intermediate.dense.weight"
  without = {name: x for name, x in tensors.items() if name != key}
  refused(without, tmp_path, r"1 leaves missing: text_decoder/layers/intermediate")
  refused(
    without | {key.replace("intermediate", "intermediatd"): tensors[key]},
    tmp_path,
    r"1 unknown tensors: text_decoder.bert.encoder.layer.\d.*; 1 leaves missing: "
    r"text_decoder/layers/intermediate",
  )
  refused(
    tensors | {key: tensors[key].T},
    tmp_path,
    r"1 tensors of another shape: text_decoder.bert.encoder",
  )
  unfused = {n: x for n, x in tensors.items() if not n.startswith("fusion_encoder.encoder.layer.")}
  refused(unfused, tmp_path, "1 leaves missing: fusion_encoder")
  refused(
    tensors
    | {
      "text_decoder.cls.predictions.decoder.weight": tensors[
        "text_decoder.cls.predictions.decoder.weight"
      ]
      + 1
    },
    tmp_path,
    "are one tensor in the official model, but their values differ",
  )
  refused(
    tensors | {f"module.{key}": tensors[key]},
    tmp_path,
    "1 tensors have two names, for example .* and module",
  )
  refused({"weight": np.zeros((3, 4), np.float32)}, tmp_path, "fit no known format")
  refused(tensors, tmp_path, "leaves missing: .*fusion_encoder/layer_", fusion_layers=5)
  refused(
    tensors,
    tmp_path,
    "--image_size=20 is no multiple of the image encoder's patch size 8",
    image_size=20,
  )


@pytest.mark.parametrize("converted", ["ours", "ours.safetensors"])
def test_a_leaf_that_cannot_be_made_leaves_nothing(converted, tmp_path, monkeypatch):
  """The error comes after half of the leaves; its cause is reported."""
  source = save(tmp_path / "official.pth", state_dict("caption"))
  calls = []
  make = importer._make

  def broken(*args):
    calls.append(args)
    if len(calls) == 60:
      raise ValueError("the file ends inside this tensor")
    return make(*args)

  monkeypatch.setattr(importer, "_make", broken)
  with pytest.raises(ValueError, match="^the file ends inside this tensor$"):
    importer.convert_checkpoint(source, tmp_path / converted, **GIVEN)
  assert [p.name for p in tmp_path.iterdir()] == ["official.pth"]


def test_a_failed_export_keeps_the_old_files(tmp_path, monkeypatch):
  importer.convert_checkpoint(
    save(tmp_path / "official.pth", state_dict("caption")), tmp_path / "ours.safetensors", **GIVEN
  )
  exporter.export_torch(tmp_path / "ours.safetensors", tmp_path / "back.pth", slim=True)
  before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
  monkeypatch.setattr(official_inventory, "initial", lambda *unused: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    exporter.export_torch(tmp_path / "ours.safetensors", tmp_path / "back.pth")
  assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
  with pytest.raises(ValueError, match="is the checkpoint itself"):
    exporter.export_torch(tmp_path / "ours.safetensors", tmp_path / "ours.safetensors")
  with pytest.raises(ValueError, match="is already a converted checkpoint"):
    importer.convert_checkpoint(tmp_path / "ours.safetensors", tmp_path / "again")
