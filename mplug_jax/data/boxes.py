"""Boxes: corners and centers, overlaps, and the bins of location tokens.

Corners are (x1, y1, x2, y2) with exclusive ends; a centered box is (center x, center y, width,
height). All are floats [..., 4] in any unit. The functions take NumPy or JAX arrays and return
arrays of the same library.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

from jaxtyping import Float, Int, Num

AnyArray: TypeAlias = Any  # a NumPy or JAX array

ROUNDINGS = ("down", "nearest")
_EPSILON = 1e-5  # of the denominators of `generalized_iou`, as in the official loss


def to_corners(centered: Float[AnyArray, "*boxes 4"]) -> Float[AnyArray, "*boxes 4"]:
  """Converts centered boxes to corners.

  Args:
    centered: centered boxes.
  """
  xp = centered.__array_namespace__()
  middle = centered[..., :2]
  half = centered[..., 2:] / 2
  return xp.concatenate([middle - half, middle + half], axis=-1)


def to_centered(corners: Float[AnyArray, "*boxes 4"]) -> Float[AnyArray, "*boxes 4"]:
  """Converts corners to centered boxes.

  Args:
    corners: corners of the boxes.
  """
  xp = corners.__array_namespace__()
  low = corners[..., :2]
  high = corners[..., 2:]
  return xp.concatenate([(low + high) / 2, high - low], axis=-1)


def cut(
  corners: Float[AnyArray, "*boxes 4"], size: Num[AnyArray, "... 2"]
) -> Float[AnyArray, "*boxes 4"]:
  """Cuts boxes at the edges of their image; what lies outside becomes an empty box at an edge.

  Args:
    corners: corners of the boxes, pixels.
    size: width and height of the image, pixels; broadcasts with the boxes.
  """
  xp = corners.__array_namespace__()
  limits = xp.concatenate([size, size], axis=-1).astype(corners.dtype)
  return xp.minimum(xp.maximum(corners, 0), limits)


def inside(
  corners: Sequence[float], width: float, height: float
) -> tuple[float, float, float, float] | None:
  """Returns the part of a box inside its image, None if there is none.

  Args:
    corners: (x1, y1, x2, y2) in pixels.
    width: of the image in pixels.
    height: of the image in pixels.
  """
  x1, y1, x2, y2 = corners
  x1 = max(x1, 0)
  y1 = max(y1, 0)
  x2 = min(x2, width)
  y2 = min(y2, height)
  return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def _areas(a, b):
  """Corners [..., 4] twice -> (intersection, union, hull) [...].

  A box whose ends are exchanged counts as empty.
  """
  xp = a.__array_namespace__()

  def area(low, high):
    return xp.prod(xp.maximum(high - low, 0), axis=-1)

  shared = area(xp.maximum(a[..., :2], b[..., :2]), xp.minimum(a[..., 2:], b[..., 2:]))
  hull = area(xp.minimum(a[..., :2], b[..., :2]), xp.maximum(a[..., 2:], b[..., 2:]))
  return shared, area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - shared, hull


def iou(
  a: Float[AnyArray, "*boxes 4"], b: Float[AnyArray, "*boxes 4"]
) -> Float[AnyArray, "*boxes"]:
  """Computes intersection over union, pair by pair; 0 for two empty boxes.

  Args:
    a: corners of the first boxes.
    b: corners of the second boxes.
  """
  xp = a.__array_namespace__()
  shared, union, _ = _areas(a, b)
  return shared / xp.where(union > 0, union, 1)


def generalized_iou(
  a: Float[AnyArray, "*boxes 4"], b: Float[AnyArray, "*boxes 4"]
) -> Float[AnyArray, "*boxes"]:
  """Computes generalized IoU (Rezatofighi et al. 2019), in [-1, 1].

  It is the IoU minus the share of the common hull that neither box covers.

  Args:
    a: corners of the first boxes.
    b: corners of the second boxes.
  """
  shared, union, hull = _areas(a, b)
  return shared / (union + _EPSILON) - (hull - union) / (hull + _EPSILON)


def quantize(
  shares: Float[AnyArray, "*shape"], bins: int, rounding: str = "down"
) -> Int[AnyArray, "*shape"]:
  """Converts coordinates to numbers of bins.

  Args:
    shares: coordinates as shares of the image; they are clipped to [0, 1].
    bins: number of bins minus 1, because both ends have a bin.
    rounding: one of ROUNDINGS; "down", the official one, moves boxes up and to the left by half a
      bin on average.

  Returns:
    i32, numbers from 0 to `bins`.
  """
  xp = shares.__array_namespace__()
  half = 0.5 if rounding == "nearest" else 0
  return xp.floor(xp.clip(shares, 0, 1) * bins + half).astype(xp.int32)


def dequantize(numbers: Int[AnyArray, "*shape"], bins: int) -> Float[AnyArray, "*shape"]:
  """Converts numbers of bins to f32, the share of the image where each bin begins.

  Args:
    numbers: numbers of bins, 0 to `bins`.
    bins: as in `quantize`.
  """
  xp = numbers.__array_namespace__()
  return numbers.astype(xp.float32) / xp.float32(bins)
