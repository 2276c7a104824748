"""Checkpoints of the official mPLUG code."""

from collections.abc import Collection, Mapping
from typing import Any

from mplug_jax.conversion.formats.bert_parts import (
  BERT_CROSS,
  BERT_LAYER,
  bert_geometry,
  bert_layers,
  embeddings,
  head,
)
from mplug_jax.conversion.formats.format import Format, Geometry, Placement, Shapes, layers
from mplug_jax.conversion.formats.vision import vision_geometry

_VISUAL = r"visual_encoder\.visual"
_BLOCK = _VISUAL + r"\.transformer\.resblocks\.(\d+)"
_ROWS = (  # and OpenAI's CLIP and open_clip, whose names are the image encoder's
  (_VISUAL + r"\.class_embedding", "visual_encoder/class_embedding", "copy"),
  (_VISUAL + r"\.positional_embedding", "visual_encoder/position_embedding", "copy"),
  (_VISUAL + r"\.conv1\.weight", "visual_encoder/patch_embed/kernel", "patches"),
  (_VISUAL + r"\.(ln_pre|ln_post)", r"visual_encoder/\1", "norm"),
  (_BLOCK + r"\.attn\.in_proj", r"visual_encoder/blocks[\1]/attention", "qkv"),
  (_BLOCK + r"\.attn\.out_proj", r"visual_encoder/blocks[\1]/attention/out", "linear"),
  (_BLOCK + r"\.(ln_1|ln_2)", r"visual_encoder/blocks[\1]/\2", "norm"),
  (_BLOCK + r"\.mlp\.c_fc", r"visual_encoder/blocks[\1]/mlp/up", "linear"),
  (_BLOCK + r"\.mlp\.c_proj", r"visual_encoder/blocks[\1]/mlp/down", "linear"),
  # docs/official.md item 42.
  (_VISUAL + r"\.proj", "CLIP's own projection, never used", "dead"),
  (
    r"visual_encoder\.(input_resolution|context_length|vocab_size)",
    "CLIP's own sizes, never used",
    "dead",
  ),
  (
    r"visual_encoder\.(?!visual\.|input_resolution$|context_length$|vocab_size$).*",
    "CLIP's text tower, never run",
    "dead",
  ),
  (r"visn_fc", "visn_fc", "linear"),
  (r"visn_layer_norm", "visn_layer_norm", "norm"),
  *embeddings("text_encoder", "text_encoder"),
  *bert_layers("text_encoder", r"text_encoder/layers[\1]", rows=BERT_LAYER + BERT_CROSS),
  (r"(text_encoder|fusion_encoder)\.pooler\..*", "BERT's pooler, never run", "dead"),
  (r"fusion_encoder\.embeddings\.position_ids", "0, 1, 2, ...", "constant"),
  (
    r"fusion_encoder\.embeddings\.(?!position_ids).*",
    "the fusion encoder's embeddings, never run",
    "dead",
  ),
  *bert_layers("fusion_encoder", r"fusion_encoder/layer_<\1>", rows=BERT_LAYER + BERT_CROSS),
  *head(r"fusion_encoder\.cls\.predictions", "fusion_encoder/mlm_head/head"),
  (
    r"fusion_encoder\.cls\.predictions\.decoder\.weight",
    "fusion_encoder/mlm_head/word/embedding",
    "copy",
  ),
  *embeddings(r"text_decoder\.bert", "text_decoder"),
  *bert_layers(r"text_decoder\.bert", r"text_decoder/layers[\1]", rows=BERT_LAYER + BERT_CROSS),
  *head(r"text_decoder\.cls\.predictions", "text_decoder/head"),
  (
    r"text_decoder\.cls\.predictions\.decoder\.weight",
    "text_decoder.bert.embeddings.word_embeddings.weight",
    "tied",
  ),
  (r"(vision_proj|text_proj|itm_head)", r"\1", "linear"),
  (r"temp", "temp/value", "copy"),
  (r"(image_queue|text_queue|idx_queue|queue_ptr)", r"\1", "queue"),
  (r"(prefix_ids|target_ids|bbox_prob_mask)", "location tokens of grounding", "constant"),
)


def geometry(shapes: Shapes, overrides: Mapping[str, Any]) -> Geometry:
  """Infers fields of MPlug from {table name: shape}; {} without encoders."""
  vision = vision_geometry(
    shapes,
    "visual_encoder.visual.class_embedding",
    "visual_encoder.visual.conv1.weight",
    "visual_encoder.visual.positional_embedding",
    _BLOCK + r"\.",
  )
  parts = ("text_decoder.bert", "text_encoder", "fusion_encoder")
  bert = bert_geometry(shapes, parts, r"text_\w+\..*\.intermediate\.dense\.weight")
  if not vision and not bert:
    return {}
  depths = {
    "text_layers": layers(shapes, r"text_encoder\.encoder\.layer\.(\d+)\."),
    "fusion_layers": layers(shapes, r"fusion_encoder\.encoder\.layer\.(\d+)\."),
    "decoder_layers": layers(shapes, r"text_decoder\.bert\.encoder\.layer\.(\d+)\."),
  }
  fields = vision | bert | {field: count for field, count in depths.items() if count}
  fields["stride"] = 6 if "visn_fc.weight" in shapes else 3
  if "vision_proj.weight" in shapes:
    fields["embed_dim"] = shapes["vision_proj.weight"][0]
  return fields


def placement(keys: Collection[str], geometry: Mapping[str, Any]) -> Placement:
  """Maps the last stored fusion layers to the model's."""
  stored = layers(keys, r"fusion_encoder\.encoder\.layer\.(\d+)\.")
  return Placement(stored - geometry["fusion_layers"])


def geometry_from_recording(meta: Mapping[str, Any]) -> Geometry:
  """Returns the fields of MPlug of a recording of the official code.

  Args:
    meta: the recording's `meta`, with the entries geometry, bert_config and config.
  """
  geometry = meta["geometry"]
  bert = meta["bert_config"]
  return dict(
    image_size=geometry["image"],
    patch_size=geometry["patch"],
    vision_width=geometry["vision_width"],
    vision_layers=geometry["vision_layers"],
    vocab_size=bert["vocab_size"],
    hidden_size=bert["hidden_size"],
    heads=bert["num_attention_heads"],
    mlp_dim=bert["intermediate_size"],
    max_positions=bert["max_position_embeddings"],
    text_layers=meta.get("text_encoder_layers_kept", bert["text_encoder_layers"]),
    fusion_layers=bert["fusion_layers"],
    stride=bert["stride_layer"],
    decoder_layers=bert["text_decode_layers"],
    embed_dim=meta["config"]["embed_dim"],
    pad_id=bert["pad_token_id"],
  )


FORMAT = Format(
  name="mplug",
  title="mPLUG (visual_encoder..., text_encoder..., fusion_encoder..., text_decoder...)",
  sign=r"(visual_encoder|text_encoder|fusion_encoder|text_decoder)(_m)?\.",
  rows=_ROWS,
  geometry=geometry,
  placement=placement,
  renames=(
    (r"^(text_encoder|text_encoder_m)\.bert\.", r"\1."),
    # Two names of the pre-training model's core.
    (r"^(fusion_encoder|fusion_encoder_m)\.(fusion|bert)\.", r"\1."),
  ),
)
