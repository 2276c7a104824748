"""Infers the geometry of a model from the shapes of foreign tensors."""

from typing import Any

from mplug_jax.config.presets import PRESETS
from mplug_jax.conversion import formats
from mplug_jax.conversion.formats.format import Geometry, Shapes

# Fields of MPlug that a run's config.model holds.
GEOMETRY = ("embed_dim", "fusion", "vision_heads", *PRESETS["base"])


def infer_geometry(shapes: Shapes, **overrides: Any) -> Geometry:
  """Infers the fields of MPlug from tensor shapes.

  Defaults for fields that shapes do not determine: attention heads are 64 wide, the last 6 stored
  fusion layers run, the stride is 6 for a model with a projection of the image tokens (large) and 3
  for one without. Missing parts have the base model's sizes. The modules of `formats` document how
  each format fills the parts.

  Args:
    shapes: {table name of a tensor: its shape}.
    **overrides: fields that replace the inferred ones; for example heads and vision_heads where
      heads are not 64 wide (as in CLIP's ViT-H/14).

  Raises:
    ValueError: the tensors have neither an image encoder nor a text part, a tensor that determines
      a size is missing, or the width is no multiple of the number of heads.
  """
  base = PRESETS["base"]
  known = {}
  for fmt in reversed(formats.FORMATS):
    known |= fmt.geometry(shapes, overrides)
  if not known:
    raise ValueError(
      "These tensors fit no known format: neither an image encoder nor a text part "
      "is among them; give a file of a whole model."
    )
  g = {"embed_dim": 256, "pad_id": 0} | base | {"stride": 3} | known
  g["fusion_layers"] = min(g["fusion_layers"], base["fusion_layers"])
  g |= overrides
  for part, width, heads in (
    ("the text encoder", g["hidden_size"], g["heads"]),
    ("the image encoder", g["vision_width"], g.get("vision_heads") or 1),
  ):
    if heads < 1 or width % heads:
      raise ValueError(
        f"The width {width} of {part} cannot be divided into {heads} attention heads; "
        "give another number of heads."
      )
  return g
