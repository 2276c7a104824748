"""Decoding of images and the train and evaluation transforms; everything is u8[H, W, 3] RGB.

Resizing is Pillow's antialiased bicubic, as in the official pipeline. Normalization by MEAN and
STD happens on the device: (image / 255 - MEAN) / STD.
"""

import io
import math
import os
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from mplug_jax.data.errors import ImageError
from mplug_jax.data.images import randaugment as randaugment_lib
from mplug_jax.data.storage import archives

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
MAX_PIXELS = 100_000_000  # width * height; above this a small file could fill the memory

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {  # value of the tag -> transposition that makes the image upright
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
_CROP_TRIES = 10


def decode_image(image: Any, name: str | None = None) -> UInt8[np.ndarray, "height width 3"]:
  """Reads any image as 8-bit RGB, upright.

  EXIF rotation is applied, transparency is composited over white as viewers do, 16-bit values keep
  their high byte, grayscale, palette and CMYK are converted, and an animation gives its first
  frame.

  Args:
    image: path (also into an archive, see archives.py), encoded bytes, PIL image, or array u8/u16
      [H, W], [H, W, 1], [H, W, 3], [H, W, 4]. An ImageError, which a source gives in place of an
      image that it could not read, is raised.
    name: name of the image in error messages; default its path or its kind.

  Returns:
    u8[H, W, 3], C-contiguous.

  Raises:
    ImageError: the image is unreadable; names the image and the reason.
    TypeError: `image` is none of these types.
  """
  if isinstance(image, ImageError):
    raise image
  try:
    if isinstance(image, (str, os.PathLike)):
      name = name or os.fspath(image)
      return _decode_bytes(archives.open_bytes(image))
    if isinstance(image, (bytes, bytearray, memoryview)):
      name = name or f"({len(image)} encoded bytes)"
      return _decode_bytes(bytes(image))
    if isinstance(image, Image.Image):
      name = name or "(PIL image)"
      return _to_rgb(image)
    if isinstance(image, np.ndarray):
      name = name or "(array)"
      return _from_array(image)
  except FileNotFoundError as error:
    raise ImageError(f"Image {name} does not exist.") from error
  except UnidentifiedImageError as error:
    raise ImageError(f"Image {name} cannot be read: not an image of a known format.") from error
  except Exception as error:  # Decoders raise anything on damaged bytes.
    raise ImageError(
      f"Image {name} cannot be read: {(str(error) or repr(error)).rstrip('.')}."
    ) from error
  raise TypeError(
    f"An image is a path, bytes, a PIL image or an array, not {type(image).__name__}."
  )


def _decode_bytes(data: bytes) -> np.ndarray:
  with Image.open(io.BytesIO(data)) as image:  # reads the header only
    _check_size(*image.size)
    if image.format == "JPEG" and image.mode == "RGB" and _orientation(image) not in _UPRIGHT:
      # Same pixels as Pillow in half the time. It returns None for data that Pillow rejects.
      flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
      pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
      if pixels is not None:
        return pixels
    return _to_rgb(image)


def _orientation(image: Image.Image) -> int:
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except Exception:  # Broken EXIF data, common in web images, does not spoil the pixels.
    return 1


def _check_size(width: int, height: int) -> None:
  if width * height > MAX_PIXELS:
    raise ValueError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}.")


def _to_rgb(image: Image.Image) -> np.ndarray:
  """PIL image of any mode to u8[H, W, 3]."""
  _check_size(*image.size)
  orientation = _orientation(image)
  if orientation in _UPRIGHT:
    image = image.transpose(_UPRIGHT[orientation])
  if image.mode.startswith(("I", "F")):  # more than 8 bits, grayscale
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
      raise ValueError("its pixels are neither 8 nor 16 bits, so white is undefined; convert it.")
    return _from_array(pixels.astype(np.uint16))
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(white, image)
  return np.array(image.convert("RGB"))


def _from_array(array: np.ndarray) -> np.ndarray:
  """u8 or u16 [H, W] or [H, W, 1 | 3 | 4] to u8[H, W, 3]."""
  shape = array.shape
  if (
    array.dtype not in (np.uint8, np.uint16)
    or 0 in shape
    or not (array.ndim == 2 or array.ndim == 3 and shape[2] in (1, 3, 4))
  ):
    raise ValueError(
      f"expected uint8 or uint16 of shape [H, W] or [H, W, 1 | 3 | 4], got "
      f"{array.dtype} {list(shape)}."
    )
  if array.dtype == np.uint16:
    array = (array >> 8).astype(np.uint8)
  if array.ndim == 2:
    array = array[..., None]
  if array.shape[2] == 4:
    return _to_rgb(Image.fromarray(array))
  return np.ascontiguousarray(np.broadcast_to(array, shape[:2] + (3,)))


def eval_transform(
  image: UInt8[np.ndarray, "height width 3"], size: int
) -> UInt8[np.ndarray, "{size} {size} 3"]:
  """Resizes with Pillow's bicubic filter, without keeping proportions.

  Args:
    image: RGB pixels.
    size: side of the result in pixels.

  Returns:
    The resized image; `image` itself, not a copy, if it has this size.
  """
  if image.shape[:2] == (size, size):
    return image
  return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def random_crop_box(
  height: int,
  width: int,
  rng: np.random.Generator,
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
  """Draws a box of random area and aspect ratio, as torchvision does.

  The area is uniform in `scale` times the image's, the logarithm of width / height uniform between
  the logarithms of `ratio`. After 10 boxes that do not fit, the result is the largest central box
  with proportions within `ratio`.

  Args:
    height: of the image in pixels.
    width: of the image in pixels.
    rng: source of all randomness.
    scale: smallest and largest area, as fractions of the image's.
    ratio: smallest and largest width / height.

  Returns:
    (top, left, height, width) in pixels.
  """
  for _ in range(_CROP_TRIES):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w = round(math.sqrt(area * aspect))
    h = round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
  w = width
  h = height
  if width / height < ratio[0]:
    h = round(width / ratio[0])
  elif width / height > ratio[1]:
    w = round(height * ratio[1])
  return (height - h) // 2, (width - w) // 2, h, w


def train_transform(
  image: UInt8[np.ndarray, "height width 3"],
  size: int,
  rng: np.random.Generator,
  scale: tuple[float, float] = (0.5, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  flip: float = 0.5,
  randaugment: tuple[int, float] | None = (2, 7),
  sharpness_wraps: bool = False,
) -> UInt8[np.ndarray, "{size} {size} 3"]:
  """Applies a random crop, bicubic resize, horizontal flip and RandAugment.

  Args:
    image: RGB pixels.
    size: side of the result in pixels.
    rng: source of all randomness; the same state gives the same image.
    scale: smallest and largest crop, as fractions of the image's area; (1, 1) does not change an
      image of the right size.
    ratio: smallest and largest width / height of the crop.
    flip: probability of mirroring left and right; use 0 if left and right have a meaning.
    randaugment: (operations drawn, magnitude 0..10), None for none.
    sharpness_wraps: see `randaugment.sharpness` (docs/official.md item 55).

  Returns:
    RGB pixels, C-contiguous; `image` itself if nothing changed.
  """
  height, width = image.shape[:2]
  if not (tuple(scale) == (1, 1) and (height, width) == (size, size)):
    top, left, h, w = random_crop_box(height, width, rng, scale, ratio)
    image = eval_transform(image[top : top + h, left : left + w], size)
  if rng.random() < flip:
    image = image[:, ::-1]
  image = np.ascontiguousarray(image)
  if randaugment is not None:
    num_ops, magnitude = randaugment
    image = randaugment_lib.rand_augment(image, rng, num_ops, magnitude, sharpness_wraps)
  return image
