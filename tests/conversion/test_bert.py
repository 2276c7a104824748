"""Conversion of BERT: text encoder, fusion encoder, decoder and heads."""

import numpy as np
import pytest

from mplug_jax.config.presets import PRESETS
from mplug_jax.conversion import importer, mapping, official_inventory, storage
from mplug_jax.conversion.geometry import infer_geometry
from tests.support.source_checks import assert_leaves, converted, refused, saved
from tests.support.source_tensors import (
  MLP,
  POSITIONS,
  VOCAB,
  WIDTH,
  bert,
  bert_leaves,
)


@pytest.mark.parametrize(
  ("layers", "options", "parts"),
  [
    (8, {}, (6, 2, 8)),
    (8, {"text_layers": 3}, (3, 5, 8)),
    (8, {"text_layers": 1}, (1, 6, 8)),
    (3, {}, (3, 0, 3)),
  ],
  ids=str,
)
def test_bert_starts_the_text_encoder_the_fusion_encoder_and_the_decoder(
  layers, options, parts, tmp_path
):
  tensors = bert(layers)
  assert_leaves(
    converted(tensors, tmp_path / "a", heads=2, **options), bert_leaves(tensors, *parts)
  )
  geometry, _ = storage.read_description(tmp_path / "a" / "converted.safetensors")
  text, fusion, decoder = parts
  assert [
    geometry[name] for name in ("text_layers", "fusion_layers", "decoder_layers", "heads")
  ] == [text, fusion or 6, decoder, 2]
  sizes = [geometry[name] for name in ("vocab_size", "hidden_size", "mlp_dim", "max_positions")]
  assert sizes == [VOCAB, WIDTH, MLP, POSITIONS]


def bert_model_names(tensors):
  return {
    name.removeprefix("bert."): x for name, x in tensors.items() if not name.startswith("cls.")
  }


def old_norm(name):
  return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
    "LayerNorm.bias", "LayerNorm.beta"
  )


BERT_NAMES = {
  "old norms": lambda t: {old_norm(n): x for n, x in t.items()},
  "without what is tied, constant or never run": lambda t: {
    n: x
    for n, x in t.items()
    if not any(part in n for part in ("decoder", "pooler", "seq_relationship", "position_ids"))
  },
  "distributed": lambda t: {f"module.{n}": x for n, x in t.items()},
}


@pytest.mark.parametrize("names", BERT_NAMES)
def test_names_of_bert_give_the_same_leaves(names, tmp_path):
  tensors = bert()
  renamed = BERT_NAMES[names](tensors)
  assert renamed.keys() != tensors.keys()
  assert_leaves(converted(renamed, tmp_path / "a"), bert_leaves(tensors, 6, 2, 8))


def test_bert_without_a_head_leaves_the_heads_new(tmp_path):
  tensors = bert(head=False)
  expected = bert_leaves(tensors, 6, 2, 8, head=False)
  assert not any("head" in path for path in expected)
  assert_leaves(converted(tensors, tmp_path / "prefix"), expected)
  assert_leaves(converted(bert_model_names(tensors), tmp_path / "none"), expected)


def test_each_tensor_of_bert_says_what_became_of_it(tmp_path):
  manifest = importer.convert_checkpoint(
    saved(bert(), tmp_path / "bert.pth"), tmp_path / "c.safetensors"
  )
  rows = {row["name"]: row for row in manifest["tensors"]}
  assert rows["bert.encoder.layer.7.output.dense.weight"]["to"] == [
    "params/fusion_encoder/layer_1/output/kernel",
    "params/text_decoder/layers/output/kernel[7]",
  ]
  assert rows["bert.encoder.layer.2.output.dense.weight"]["to"] == [
    "params/text_encoder/layers/output/kernel[2]",
    "params/text_decoder/layers/output/kernel[2]",
  ]
  actions = {name: row["action"] for name, row in rows.items() if row["action"] != "map"}
  assert actions == {
    "bert.embeddings.position_ids": "constant",
    "cls.predictions.decoder.weight": "tied",
    "cls.predictions.decoder.bias": "tied",
    **{
      f"{name}.{part}": "dead"
      for name in ("bert.pooler.dense", "cls.seq_relationship")
      for part in ("weight", "bias")
    },
  }


def test_bert_comes_back_from_the_first_place_of_each_tensor():
  tensors = bert()
  shapes = {name: x.shape for name, x in tensors.items()}
  geometry = infer_geometry(shapes)
  leaves = bert_leaves(tensors, 6, 2, 8)
  entries = mapping.plan(shapes, geometry)
  assert sum(entry.action == "map" for entry in entries.values()) == 5 + 8 * 16 + 5
  for name, entry in entries.items():
    if entry.action == "map":
      np.testing.assert_array_equal(
        mapping.tensor_to_torch(entry, leaves.__getitem__, shapes[name]),
        tensors[name],
        err_msg=name,
      )


def test_bert_base_fits_the_released_base_model():
  """The shapes give the preset's geometry; only cross-attention is left of the text parts."""
  base = PRESETS["base"] | {"embed_dim": 256, "pad_id": 0}
  shapes = {
    name.removeprefix("text_decoder."): x.shape
    for name, x in official_inventory.inventory("caption", base).items()
    if name.startswith("text_decoder.") and "crossattention" not in name
  }
  assert infer_geometry(shapes) == base
  entries = mapping.plan(shapes, base).values()
  written = {path for entry in entries if entry.action == "map" for path in entry.paths}
  left = {
    path for path in mapping.leaf_shapes(base) if path.startswith(("text_", "fusion_encoder"))
  } - written
  left -= {path for path in left if path.startswith("text_proj")}
  assert all("/crossattention" in path for path in left)
  assert len(left) == 10 * (1 + 5)  # 5 of the 6 fusion layers


def test_mistakes_in_bert_are_named():
  tensors = bert()

  def without(key):
    return {name: x for name, x in tensors.items() if not name.startswith(key)}

  layer = "bert.encoder.layer.{}."
  refused(
    without(layer.format(7) + "output.dense.bias"),
    "2 leaves missing: fusion_encoder/layer_1/output/bias, text_decoder/layers/output/bias",
  )
  refused(
    without(layer.format(0) + "attention.self.key"),
    "4 leaves missing: text_decoder/layers/attention.*text_encoder/layers/attention",
  )
  refused(
    without("cls.predictions.bias"),
    "2 leaves missing: fusion_encoder/mlm_head/head/bias, text_decoder/head/bias",
  )
  refused(without("bert.embeddings.word"), "fit no known format: neither")
  refused(
    without("bert.embeddings.position"),
    "tensor bert.embeddings.position_embeddings.weight, from which .* is missing",
  )
  crossing = layer.format(0) + "crossattention.self.query.weight"
  refused(
    tensors | {crossing: np.zeros((WIDTH, WIDTH), np.float32)},
    "1 unknown tensors: bert.encoder.layer",
  )
  refused(
    tensors | {"classifier.weight": np.zeros((2, WIDTH))}, "1 unknown tensors: classifier.weight"
  )
  query = layer.format(3) + "attention.self.query.weight"
  refused(
    tensors | {query: np.zeros((WIDTH, MLP))}, "1 tensors of another shape: bert.encoder.layer"
  )
  refused(
    tensors | {query.replace(".3.", ".03."): tensors[query]},
    "2 leaves written twice: text_decoder/layers/attention.*, text_encoder/layers/attention",
  )
  bias = "cls.predictions.decoder.bias"
  refused(tensors | {bias: np.zeros(VOCAB)}, bias + " and cls.predictions.bias are one tensor")
  refused(
    tensors | {"bert.embeddings.LayerNorm.gamma": np.zeros(WIDTH)},
    "have two names, .*LayerNorm.weight and .*LayerNorm.gamma",
  )
  refused(tensors, "leaves missing: fusion_encoder/layer_2", fusion_layers=3)
  refused(tensors, "leaves missing: text_decoder/layers", decoder_layers=9)
  refused(tensors, "width 64 of the text encoder cannot be divided into 5 attention heads", heads=5)
  refused(
    tensors | {"bert.encoder.layer.5000.output.dense.bias": np.zeros(WIDTH)},
    "number layers up to 5000, but there are",
  )
