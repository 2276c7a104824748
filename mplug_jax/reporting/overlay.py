"""A heat map over an image."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from mplug_jax.reporting.style import BOX, CELL

if TYPE_CHECKING:
  from PIL.Image import Image as Picture


def overlay(
  image: UInt8[np.ndarray, "height width 3"],
  heat: Float[np.ndarray, "rows columns"] | None,
  boxes: Sequence[Sequence[float]] = (),
) -> UInt8[np.ndarray, "new_height new_width 3"]:
  """Draws a heat map and boxes over an image; hot regions are bright and colored.

  Args:
    image: RGB pixels; a small image is enlarged by a whole factor.
    heat: not negative, a grid over the whole image; its largest value gets the full color. None:
      only boxes are drawn.
    boxes: corners (x1, y1, x2, y2) in pixels of `image`.
  """
  from PIL import Image, ImageDraw

  factor = max(1, CELL // max(image.shape[:2]))
  picture = Image.fromarray(image).resize(
    (image.shape[1] * factor, image.shape[0] * factor), Image.Resampling.NEAREST
  )
  picture = picture if heat is None else _heated(picture, np.asarray(heat, np.float32))
  for x1, y1, x2, y2 in boxes:
    corners = (x1 * factor, y1 * factor, max(x1, x2) * factor, max(y1, y2) * factor)
    ImageDraw.Draw(picture).rectangle(
      corners, outline=BOX, width=max(2, round(max(picture.size) / 150))
    )
  return np.asarray(picture)


def _heated(picture: "Picture", heat: np.ndarray) -> "Picture":
  """Blends a picture with a map f32[G, G'], smoothed to its size; cold regions are dark."""
  import matplotlib
  from PIL import Image

  heat = heat / heat.max() if heat.max() > 0 else heat
  resized = Image.fromarray(heat).resize(picture.size, Image.Resampling.BICUBIC)
  smooth = np.clip(np.asarray(resized), 0, 1)
  color = 255 * matplotlib.colormaps["inferno"](smooth)[..., :3]
  smooth = smooth[..., None]
  pixels = np.asarray(picture, np.float32)
  blended = pixels * (0.35 + 0.65 * smooth) * (1 - 0.45 * smooth) + 0.45 * smooth * color
  return Image.fromarray(blended.astype(np.uint8))
