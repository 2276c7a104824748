"""RandAugment as the official pipeline runs it: ten operations on RGB uint8 images.

Every operation maps u8[H, W, 3] to u8[H, W, 3] and truncates to uint8. Warps are bilinear and fill
with gray 128. The photometric operations equal Pillow's.

Own code rather than a library's RandAugment: the official arithmetic, roundings included.
"""

from collections.abc import Callable
from typing import TypeAlias

import cv2
import numpy as np
from jaxtyping import UInt8

Pixels: TypeAlias = UInt8[np.ndarray, "height width 3"]

MAX_MAGNITUDE = 10
PROBABILITY = 0.5  # of applying each drawn operation
FILL = (128, 128, 128)

# Smoothing kernel that Sharpness moves away from.
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def auto_contrast(image: Pixels) -> Pixels:
  """Stretches each channel so that its darkest value becomes 0 and its brightest 255.

  Args:
    image: RGB pixels.
  """
  tables = np.empty((256, 3), np.uint8)
  for channel in range(3):
    low = int(image[..., channel].min())
    high = int(image[..., channel].max())
    values = np.arange(256, dtype=np.float64)
    if high > low:
      scale = 255.0 / (high - low)
      values = np.clip(values * scale - low * scale, 0, 255)
    tables[:, channel] = values.astype(np.uint8)
  return cv2.LUT(image, tables.reshape(1, 256, 3))


def equalize(image: Pixels) -> Pixels:
  """Flattens each channel's histogram, with Pillow's integer arithmetic.

  Args:
    image: RGB pixels.
  """
  tables = np.empty((256, 3), np.uint8)
  for channel in range(3):
    counts = np.bincount(image[..., channel].ravel(), minlength=256)
    present = np.flatnonzero(counts)
    # The brightest value does not count: it is always mapped to the top.
    step = (image[..., channel].size - counts[present[-1]]) // 255
    if step == 0:
      tables[:, channel] = np.arange(256)
    else:
      below = np.cumsum(counts) - counts
      tables[:, channel] = np.minimum((step // 2 + below) // step, 255)
  return cv2.LUT(image, tables.reshape(1, 256, 3))


def brightness(image: Pixels, factor: float) -> Pixels:
  """Multiplies by `factor` and clips.

  Args:
    image: RGB pixels.
    factor: 1 changes nothing.
  """
  return cv2.LUT(image, np.clip(np.arange(256) * factor, 0, 255).astype(np.uint8))


def sharpness(image: Pixels, factor: float, wraps: bool = False) -> Pixels:
  """Moves away from a smoothed copy: smooth + factor * (image - smooth); the border is unchanged.

  Args:
    image: RGB pixels.
    factor: 1 changes nothing, above 1 sharpens.
    wraps: values outside 0..255 wrap modulo 256, as in the official code (docs/official.md item
      55), instead of being clipped.
  """
  smooth = cv2.filter2D(image, -1, _SMOOTH).astype(np.float32)
  sharp = smooth + np.float32(factor) * (image - smooth)
  sharp = sharp.astype(np.int32) & 255 if wraps else np.clip(sharp, 0, 255)
  out = image.copy()
  out[1:-1, 1:-1] = sharp[1:-1, 1:-1].astype(np.uint8)
  return out


def _warp(image: Pixels, matrix) -> Pixels:
  """Moves content by the 2x3 affine `matrix` (source to target pixel coordinates)."""
  height, width = image.shape[:2]
  return cv2.warpAffine(
    image, np.asarray(matrix, np.float64), (width, height), flags=cv2.INTER_LINEAR, borderValue=FILL
  )


def shear_x(image: Pixels, factor: float) -> Pixels:
  """Shifts row y right by factor * y pixels.

  Args:
    image: RGB pixels.
    factor: shear.
  """
  return _warp(image, [[1, factor, 0], [0, 1, 0]])


def shear_y(image: Pixels, factor: float) -> Pixels:
  """Shifts column x down by factor * x pixels.

  Args:
    image: RGB pixels.
    factor: shear.
  """
  return _warp(image, [[1, 0, 0], [factor, 1, 0]])


def translate_x(image: Pixels, offset: float) -> Pixels:
  """Shifts content left by `offset` pixels.

  Args:
    image: RGB pixels.
    offset: in pixels.
  """
  return _warp(image, [[1, 0, -offset], [0, 1, 0]])


def translate_y(image: Pixels, offset: float) -> Pixels:
  """Shifts content up by `offset` pixels.

  Args:
    image: RGB pixels.
    offset: in pixels.
  """
  return _warp(image, [[1, 0, 0], [0, 1, -offset]])


def rotate(image: Pixels, degrees: float) -> Pixels:
  """Rotates counter-clockwise about (W / 2, H / 2).

  Args:
    image: RGB pixels.
    degrees: angle.
  """
  height, width = image.shape[:2]
  return _warp(image, cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1))


def _identity(image: Pixels) -> Pixels:
  return image


def _enhance(m: float) -> float:
  return 1.8 * m + 0.1


# name -> (operation, argument at magnitude 10 m or None, True if the argument's sign is drawn).
OPERATIONS: dict[str, tuple[Callable[..., Pixels], Callable[[float], float] | None, bool]] = {
  "identity": (_identity, None, False),
  "auto_contrast": (auto_contrast, None, False),
  "equalize": (equalize, None, False),
  "brightness": (brightness, _enhance, False),
  "sharpness": (sharpness, _enhance, False),
  "shear_x": (shear_x, lambda m: 0.3 * m, True),
  "shear_y": (shear_y, lambda m: 0.3 * m, True),
  "translate_x": (translate_x, lambda m: 10.0 * m, True),  # pixels, for all image sizes
  "translate_y": (translate_y, lambda m: 10.0 * m, True),
  "rotate": (rotate, lambda m: 30.0 * m, True),
}


def rand_augment(
  image: Pixels,
  rng: np.random.Generator,
  num_ops: int = 2,
  magnitude: float = 7,
  sharpness_wraps: bool = False,
) -> Pixels:
  """Draws `num_ops` operations with replacement and applies each with probability 1/2.

  Args:
    image: RGB pixels.
    rng: source of all randomness; the number of draws does not depend on the operations.
    num_ops: operations drawn.
    magnitude: strength, 0 to 10.
    sharpness_wraps: the official overflow of Sharpness (docs/official.md item 55).

  Raises:
    ValueError: for a magnitude outside 0..10.
  """
  if not 0 <= magnitude <= MAX_MAGNITUDE:
    raise ValueError(f"RandAugment magnitude must be in 0..{MAX_MAGNITUDE}, got {magnitude}.")
  names = list(OPERATIONS)
  for _ in range(num_ops):
    name = names[rng.integers(len(names))]
    applied, positive = rng.random(2) < PROBABILITY
    if not applied:
      continue
    operation, level, signed = OPERATIONS[name]
    args = []
    if level is not None:
      value = level(magnitude / MAX_MAGNITUDE)
      args.append(-value if signed and not positive else value)
    if name == "sharpness":
      args.append(sharpness_wraps)
    image = operation(image, *args)
  return image
