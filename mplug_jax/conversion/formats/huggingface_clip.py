"""Hugging Face's CLIP."""

from collections.abc import Collection, Mapping
from typing import Any

from mplug_jax.conversion.formats.format import Format, Geometry, Placement, Shapes
from mplug_jax.conversion.formats.vision import vision_geometry, vision_heads

_LAYER = r"vision_model\.encoder\.layers\.(\d+)"
_ROWS = (
  (r"vision_model\.embeddings\.class_embedding", "visual_encoder/class_embedding", "copy"),
  (
    r"vision_model\.embeddings\.position_embedding\.weight",
    "visual_encoder/position_embedding",
    "copy",
  ),
  (
    r"vision_model\.embeddings\.patch_embedding\.weight",
    "visual_encoder/patch_embed/kernel",
    "patches",
  ),
  (r"vision_model\.embeddings\.position_ids", "0, 1, 2, ...", "constant"),
  (r"vision_model\.pre_layrnorm", "visual_encoder/ln_pre", "norm"),  # spelt so
  (r"vision_model\.post_layernorm", "visual_encoder/ln_post", "norm"),
  *(
    (
      _LAYER + rf"\.self_attn\.{name[0]}_proj",
      rf"visual_encoder/blocks[\1]/attention/{name}",
      "linear",
    )
    for name in ("query", "key", "value")
  ),
  (_LAYER + r"\.self_attn\.out_proj", r"visual_encoder/blocks[\1]/attention/out", "linear"),
  (_LAYER + r"\.layer_norm(1|2)", r"visual_encoder/blocks[\1]/ln_\2", "norm"),
  (_LAYER + r"\.mlp\.fc1", r"visual_encoder/blocks[\1]/mlp/up", "linear"),
  (_LAYER + r"\.mlp\.fc2", r"visual_encoder/blocks[\1]/mlp/down", "linear"),
  (r"text_model\.embeddings\.position_ids", "0, 1, 2, ...", "constant"),
  (r"text_model\.(?!embeddings\.position_ids$).*", "CLIP's text tower, never run", "dead"),
  (
    r"(visual_projection\.weight|text_projection\.weight|logit_scale)",
    "CLIP's own projection, never used",
    "dead",
  ),
)


def geometry(shapes: Shapes, overrides: Mapping[str, Any]) -> Geometry:
  """Infers fields of MPlug from {table name: shape}; {} without an image encoder."""
  return vision_geometry(
    shapes,
    "vision_model.embeddings.class_embedding",
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.embeddings.position_embedding.weight",
    _LAYER + r"\.",
  )


def placement(keys: Collection[str], geometry: Mapping[str, Any]) -> Placement:
  """Maps no fusion layer: the format has none."""
  return Placement(-geometry["fusion_layers"])


FORMAT = Format(
  name="huggingface_clip",
  title="Hugging Face's CLIP (vision_model...)",
  sign=r"vision_model\.|encoder\.layers\.|embeddings\.(class|patch)_embedding",
  rows=_ROWS,
  geometry=geometry,
  placement=placement,
  table_prefix="vision_model.",
  bare=r"(embeddings|encoder|pre_layrnorm|post_layernorm)\.",  # CLIPVisionModel alone
  prefix="vision_model.",
  family="clip",
  activation="quick_gelu",
  config_section="vision_config",
  config_fields=vision_heads,
  vision_position_ids="vision_model.embeddings.position_ids",
)
