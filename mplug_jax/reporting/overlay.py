"""A heat map over an image."""

from collections.abc import Sequence

import numpy as np

from mplug_jax.reporting.style import BOX, CELL


def overlay(
  image: np.ndarray, heat: np.ndarray | None, boxes: Sequence[Sequence[float]] = ()
) -> np.ndarray:
  """An image, the brighter and the more coloured the more of the heat is there, with boxes drawn on it.

  Args:
    image: u8[H, W, 3]; a small one is enlarged by a whole factor.
    heat: f32[G, G'], not negative, a grid over the whole image; its largest value gets the full
      colour, whatever it is. None: the boxes alone.
    boxes: corners (x1, y1, x2, y2) in pixels of `image`.

  Returns:
    u8[H', W', 3].
  """
  from PIL import Image, ImageDraw

  factor = max(1, CELL // max(image.shape[:2]))
  picture = Image.fromarray(image).resize(
    (image.shape[1] * factor, image.shape[0] * factor), Image.NEAREST
  )
  picture = picture if heat is None else _heated(picture, np.asarray(heat, np.float32))
  for x1, y1, x2, y2 in boxes:
    corners = (x1 * factor, y1 * factor, max(x1, x2) * factor, max(y1, y2) * factor)
    ImageDraw.Draw(picture).rectangle(
      corners, outline=BOX, width=max(2, round(max(picture.size) / 150))
    )
  return np.asarray(picture)


def _heated(picture, heat):
  """An RGB Pillow image under a map f32[G, G'] that is smoothed to its size: dark where there is none."""
  import matplotlib
  from PIL import Image

  heat = heat / heat.max() if heat.max() > 0 else heat
  smooth = np.clip(np.asarray(Image.fromarray(heat).resize(picture.size, Image.BICUBIC)), 0, 1)
  colour = 255 * matplotlib.colormaps["inferno"](smooth)[..., :3]
  smooth, pixels = smooth[..., None], np.asarray(picture, np.float32)
  return Image.fromarray(
    np.uint8(pixels * (0.35 + 0.65 * smooth) * (1 - 0.45 * smooth) + 0.45 * smooth * colour)
  )
