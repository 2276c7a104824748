"""The geometry of a model, inferred from the shapes of foreign tensors."""

from mplug_jax.config.presets import PRESETS
from mplug_jax.conversion import formats

# Fields of MPlug that a run's config.model holds.
GEOMETRY = ("embed_dim", "fusion", "vision_heads", *PRESETS["base"])


def infer_geometry(shapes, **given):
  """{name of the conversion tables: shape} -> fields of MPlug.

  What shapes do not tell: attention heads have 64 numbers, the last 6 stored fusion layers run, the stride is 6 for a model
  with a projection of the image tokens (large) and 3 for one without. Of a BERT the text encoder takes the first 6 layers
  (or text_layers), the fusion encoder up to 6 of the others, the decoder all. Parts that are missing have the base
  model's sizes.

  Args:
    given: fields that are known better; heads and vision_heads where they are not 64 wide (as in CLIP's ViT-H/14).

  Raises:
    ValueError: there is no image encoder and no text part, or a tensor that tells a size is missing, or heads do not fit.
  """
  base, known = PRESETS["base"], {}
  for fmt in reversed(formats.FORMATS):
    known |= fmt.geometry(shapes, given)
  if not known:
    raise ValueError(
      "These tensors fit no known format: neither an image encoder nor a text part "
      "is among them; give a file of a whole model."
    )
  g = {"embed_dim": 256, "pad_id": 0} | base | {"stride": 3} | known
  g["fusion_layers"] = min(g["fusion_layers"], base["fusion_layers"])
  g |= given
  for part, width, heads in (
    ("BERT", g["hidden_size"], g["heads"]),
    ("the image encoder", g["vision_width"], g.get("vision_heads") or 1),
  ):
    if heads < 1 or width % heads:
      raise ValueError(
        f"The width {width} of {part} does not divide into {heads} attention heads; give another number of heads."
      )
  return g
