"""A sheet of sample records as an image."""

import numpy as np

from mplug_jax.data.images import ops, video
from mplug_jax.reporting import sample_sheet

SHEET_IMAGES, _SHEET_TEXTS, _SHEET_PIXELS, _SHEET_FRAMES, _SHEET_GAP = 12, 4, 288, 4, 8


_BOX_COLOUR = (230, 30, 30)


def write_sheet(report, path, frames=0) -> bool:
  """Draws the samples of a report with their texts as one PNG; a box is that of the first phrase.

  Args:
    frames: config.data.frames.

  Returns:
    False, and no file is written, if no image can be read.
  """
  if report.samples:
    images = np.stack([_picture(item, frames) for item in report.samples])
    said = [
      [sample_sheet.Sample(text, answer, "", "open") for text, answer in item.shown[:_SHEET_TEXTS]]
      for item in report.samples
    ]
    sample_sheet.sample_sheet(images, said, path)
  return bool(report.samples)


def _picture(item, frames):
  """The images of a record side by side on a white square, u8[_SHEET_PIXELS, _SHEET_PIXELS, 3]."""
  from PIL import Image, ImageDraw

  pictures = []
  for image in item.images:
    pixels = (
      video.contact_image(image, min(frames, _SHEET_FRAMES)) if frames else ops.decode_image(image)
    )
    picture = Image.fromarray(pixels)
    for _, box in item.boxes[:1]:
      ImageDraw.Draw(picture).rectangle(
        box, outline=_BOX_COLOUR, width=max(1, max(picture.size) // 100)
      )
    pictures.append(picture)
  side = (_SHEET_PIXELS + _SHEET_GAP) // len(pictures) - _SHEET_GAP
  sheet = Image.new("RGB", (_SHEET_PIXELS, _SHEET_PIXELS), "white")
  for i, picture in enumerate(pictures):
    scale = side / max(picture.size)
    size = [max(1, round(length * scale)) for length in picture.size]
    left, top = i * (side + _SHEET_GAP) + (side - size[0]) // 2, (_SHEET_PIXELS - size[1]) // 2
    sheet.paste(picture.resize(size, Image.Resampling.BICUBIC), (left, top))
  return np.asarray(sheet)
