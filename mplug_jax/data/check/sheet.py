"""A sheet of sample records as an image."""

import os
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mplug_jax.data.check.report import Report
from mplug_jax.data.examples.record_view import Item
from mplug_jax.data.images import ops, video
from mplug_jax.reporting import sample_sheet

SHEET_IMAGES = 12
_TEXTS = 4  # largest number of texts below an image
_PIXELS = 288  # side of the square of a record
_FRAMES = 4  # largest number of frames of a clip
_GAP = 8  # pixels between the images of a record
_BOX_COLOR = (230, 30, 30)


def write_sheet(report: Report, path: str | os.PathLike[str], frames: int = 0) -> bool:
  """Draws the samples of a report with their texts as one PNG.

  Only the box of the first phrase is drawn.

  Args:
    report: result of `check`.
    path: the PNG.
    frames: config.data.frames.

  Returns:
    False, and no file is written, if no image can be read.
  """
  if not report.samples:
    return False
  images = [_picture(item, frames) for item in report.samples]
  texts = [
    [sample_sheet.Sample(text, reply, "", "open") for text, reply in item.shown[:_TEXTS]]
    for item in report.samples
  ]
  sample_sheet.sample_sheet(images, texts, path)
  return True


def _pixels(image: Any, frames: int) -> np.ndarray:
  """Returns the pixels of an image, or of some frames of a clip."""
  if frames:
    return video.contact_image(image, min(frames, _FRAMES))
  return ops.decode_image(image)


def _picture(item: Item, frames: int) -> np.ndarray:
  """Returns the images of a record side by side on a white square, u8[_PIXELS, _PIXELS, 3]."""
  pictures = []
  for image in item.images:
    picture = Image.fromarray(_pixels(image, frames))
    for _, box in item.boxes[:1]:
      ImageDraw.Draw(picture).rectangle(
        box, outline=_BOX_COLOR, width=max(1, max(picture.size) // 100)
      )
    pictures.append(picture)
  side = (_PIXELS + _GAP) // len(pictures) - _GAP
  sheet = Image.new("RGB", (_PIXELS, _PIXELS), "white")
  for i, picture in enumerate(pictures):
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    left = i * (side + _GAP) + (side - width) // 2
    top = (_PIXELS - height) // 2
    sheet.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (left, top))
  return np.asarray(sheet)
