"""Sizes of a CLIP image encoder, shared by the formats that contain one."""

import math

from mplug_jax.conversion.formats.format import Geometry, Shapes, layers, shape_of


def vision_geometry(
  shapes: Shapes, token: str, patches: str, positions: str, block: str
) -> Geometry:
  """Infers fields of MPlug from an image encoder; {} without one.

  Args:
    shapes: {table name: shape}.
    token: name of the class token.
    patches: name of the patch kernel.
    positions: name of the position table.
    block: regex of a block's names, its group the number.
  """
  if token not in shapes:
    return {}
  patch = shape_of(shapes, patches, 4)[-1]
  tokens = shape_of(shapes, positions, 2)[0]
  return {
    "vision_width": shape_of(shapes, token, 1)[0],
    "patch_size": patch,
    "image_size": math.isqrt(max(tokens - 1, 0)) * patch,
    "vision_layers": layers(shapes, block),
  }


def vision_heads(heads: int, width: int) -> Geometry:
  """Returns {"vision_heads": heads}, or {} for the default head width of 64."""
  return {} if heads * 64 == width else {"vision_heads": heads}
