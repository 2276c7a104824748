"""Warnings about images whose values are probably in another range."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mplug_jax.data.storage import archives

_ORIENTATION = 0x0112  # EXIF tag
_QUARTERS = (5, 6, 7, 8)  # its values that exchange width and height
_PNG_DEPTH = 24  # position of the bit depth in a PNG file
_DARK = 15  # largest high byte of 12 bits in 16

DEEP = "deep"
BLACK = "black"
FLAT = "flat"


def _read(image: Any) -> bytes:
  return image if isinstance(image, bytes) else archives.open_bytes(image)


def is_turned(image: Any) -> bool:
  """Returns whether EXIF turns an image by a quarter; False for an unreadable one.

  Args:
    image: path or encoded bytes.
  """
  try:
    with Image.open(io.BytesIO(_read(image))) as opened:
      return opened.getexif().get(_ORIENTATION, 1) in _QUARTERS
  except Exception:  # decoders raise anything on damaged bytes
    return False


def _has_16_bits(image: Any) -> bool:
  """Returns whether the file of a readable image has 16 bits a value."""
  data = _read(image)
  with Image.open(io.BytesIO(data)) as opened:
    if opened.mode.startswith("I"):
      return True
    return opened.format == "PNG" and data[_PNG_DEPTH] == 16


def kind(image: Any, pixels: UInt8[np.ndarray, "height width 3"]) -> tuple[str, int]:
  """Returns (kind of implausible values or "", largest value).

  DEEP: 16 bits of which at most 12 are used; BLACK: no value above 1; FLAT: one color.

  Args:
    image: path or encoded bytes.
    pixels: the image as decode_image returns it.
  """
  largest = int(pixels.max())
  if largest <= _DARK and _has_16_bits(image):
    return DEEP, largest << 8 | 255
  if largest <= 1:
    return BLACK, largest
  first = pixels[0, 0]
  if (pixels[::16, ::16] == first).all() and (pixels == first).all():
    return FLAT, largest
  return "", largest


def warnings(kinds: Mapping[str, Sequence[tuple[str, int]]], images: int) -> list[str]:
  """Returns a sentence for each kind of implausible images.

  Args:
    kinds: {kind: (name, largest value) of its images}.
    images: number of all images that were opened.
  """
  sentences = []
  if deep := kinds.get(DEEP):
    name, largest = deep[0]
    sentences.append(
      f"{len(deep)} of {images} images have 16 bits a value and no value above {largest}, and so "
      f"are almost black: they look like 12 bits or fewer in 16 (first: {name}); scale them to 0 "
      "to 65535."
    )
  if black := kinds.get(BLACK):
    name, largest = black[0]
    sentences.append(
      f"{len(black)} of {images} images are black, with no value above 1 of 255: they look empty, "
      f"or like values from 0 to 1 (first: {name}); scale these to 0 to 255."
    )
  # One color alone is plausible, as of a color patch or a blank page.
  if (flat := kinds.get(FLAT)) and len(flat) >= max(3, images / 2):
    sentences.append(
      f"{len(flat)} of {images} images have one color everywhere (first: {flat[0][0]}); "
      "look at them."
    )
  return sentences
