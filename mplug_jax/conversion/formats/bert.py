"""BERT checkpoints, from the first releases to Hugging Face's."""

from collections.abc import Collection, Mapping
from typing import Any

from mplug_jax.config.presets import PRESETS
from mplug_jax.conversion.formats.bert_parts import bert_geometry, bert_layers, embeddings, head
from mplug_jax.conversion.formats.format import Format, Geometry, Placement, Shapes, layers

# The official start of pre-training: the text encoder takes the first layers, the fusion encoder
# the next, the decoder all.
_ROWS = (
  *embeddings(
    "bert", "text_encoder", "text_decoder", words=("fusion_encoder/mlm_head/word/embedding",)
  ),
  *bert_layers(
    "bert", r"text_encoder/layers[\1]", r"fusion_encoder/layer_<\1>", r"text_decoder/layers[\1]"
  ),
  *head(r"cls\.predictions", "text_decoder/head", "fusion_encoder/mlm_head/head"),
  (r"cls\.predictions\.decoder\.weight", "bert.embeddings.word_embeddings.weight", "tied"),
  (r"bert\.pooler\..*", "BERT's pooler, never run", "dead"),
  (r"cls\.seq_relationship\..*", "BERT's next sentence head, never run", "dead"),
)
# Regexes of leaves that BERT has no numbers for.
_LEAVES_NEW = (r"(fusion_encoder|text_decoder)/.*crossattention(_norm)?/.*",)
_HEADLESS_LEAVES_NEW = (*_LEAVES_NEW, r"text_decoder/head/.*")
_STORED = r"bert\.encoder\.layer\.(\d+)\."


def geometry(shapes: Shapes, overrides: Mapping[str, Any]) -> Geometry:
  """Infers fields of MPlug from {table name: shape}; {} without a word table.

  The text encoder takes the first 6 layers (or text_layers), the fusion encoder the others, the
  decoder all.
  """
  fields = bert_geometry(shapes, ("bert",), r"bert\..*\.intermediate\.dense\.weight")
  if not fields or not (stored := layers(shapes, _STORED)):
    return fields
  text = overrides.get("text_layers", min(PRESETS["base"]["text_layers"], stored))
  depths = {"text_layers": text, "fusion_layers": max(stored - text, 0), "decoder_layers": stored}
  return fields | {field: count for field, count in depths.items() if count}


def placement(keys: Collection[str], geometry: Mapping[str, Any]) -> Placement:
  """Maps the layers after the text encoder's to fusion layers."""
  has_head = any(key.startswith("cls.predictions.") for key in keys)
  has_fusion = layers(keys, _STORED) > geometry["text_layers"]
  return Placement(
    geometry["text_layers"],
    leaves_new=_LEAVES_NEW if has_head else _HEADLESS_LEAVES_NEW,
    absent=() if has_head and has_fusion else ("fusion_encoder/mlm_head/",),
    spare_layer="a layer of BERT that no part takes",
  )


FORMAT = Format(
  name="bert",
  title="BERT (bert.encoder.layer..., or encoder.layer...)",
  sign=r"bert\.|encoder\.layer\.|embeddings\.word_embeddings\.",
  rows=_ROWS,
  geometry=geometry,
  placement=placement,
  table_prefix="bert.",
  bare=r"(embeddings|encoder|pooler)\.",  # BertModel alone
  prefix="bert.",
  renames=(  # BERT's first releases
    (r"\bLayerNorm\.gamma$", "LayerNorm.weight"),
    (r"\bLayerNorm\.beta$", "LayerNorm.bias"),
  ),
  family="bert",
  activation="gelu",
  config_fields=lambda heads, width: {"heads": heads},
)
