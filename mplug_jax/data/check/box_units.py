"""Warnings about boxes whose unit or order of numbers is probably another one."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

_SMALL = 8  # pixels; in a smaller image, a box within one pixel is plausible
_SHARE = 0.01  # of boxes within one pixel, from which a warning is worth reading
_BEYOND = 0.1  # of boxes that reach beyond their image, from which their unit is doubtful
_SLACK = 1.0  # pixels by which a correct box may exceed its image, and 1% of its side
_ROUNDING = 1e-3
_SCALES = ((100, "percent"), (1000, "per mille"))  # largest value of a coordinate
_MANY = 20  # boxes, of which some reach far if they are pixels of large images


class PlacedBox(NamedTuple):
  """A box and its image.

  Attributes:
    image: name of the image.
    phrase: text that the box belongs to.
    corners: (x1, y1, x2, y2) as they were read.
    width: of the upright image in pixels.
    height: of the upright image in pixels.
    turned: whether EXIF turns the stored image by a quarter, so that its sides are exchanged.
  """

  image: str
  phrase: str
  corners: tuple[float, float, float, float]
  width: int
  height: int
  turned: bool = False

  def __str__(self) -> str:
    numbers = ", ".join(f"{x:g}" for x in self.corners)
    return f"({numbers}) of {self.phrase!r} in {self.image} of {self.width} x {self.height} pixels"


def reaches_beyond(corners: Sequence[float], width: float, height: float) -> bool:
  """Returns whether a box exceeds its image by more than rounding explains.

  Args:
    corners: (x1, y1, x2, y2) in pixels.
    width: of the image in pixels.
    height: of the image in pixels.
  """
  slack = _SLACK + 0.01 * max(width, height)
  return bool(corners[2] > width + slack or corners[3] > height + slack)


def warnings(boxes: Sequence[PlacedBox], sizes: bool = False) -> list[str]:
  """Returns a sentence for each kind of implausible boxes.

  Args:
    boxes: boxes of readable images.
    sizes: the files have [x, y, width, height].
  """
  if not boxes:
    return []
  if sentences := _shares(boxes):
    return sentences
  turned = [box for box in boxes if box.turned and _fits_stored_only(box)]
  if turned:
    sentences.append(
      f"{len(turned)} of {len(boxes)} boxes fit their image as it is stored, but not as its EXIF "
      f"orientation shows it: they were drawn without it (first: {turned[0]}); turn them with the "
      "image, or store it upright."
    )
  rest = [box for box in boxes if not box.turned]
  return sentences + (_beyond(rest, sizes) or _fixed_scale(rest))


def _shares(boxes: Sequence[PlacedBox]) -> list[str]:
  """Returns a warning if boxes are shares of the image."""
  inside = [
    box
    for box in boxes
    if max(box.corners) <= 1 + _ROUNDING and max(box.width, box.height) >= _SMALL
  ]
  # (0, 0, 1, 1) alone may be a pixel.
  fractions = any(abs(x - round(x)) > 2 * _ROUNDING for box in inside for x in box.corners)
  if not fractions or len(inside) < _SHARE * len(boxes):
    return []
  return [
    f"{len(inside)} of {len(boxes)} boxes lie within one pixel: they look like shares of the "
    f"image, 0 to 1 (first: {inside[0]}); multiply x by the width and y by the height."
  ]


def _fits_stored_only(box: PlacedBox) -> bool:
  beyond = reaches_beyond(box.corners, box.width, box.height)
  return beyond and not reaches_beyond(box.corners, box.height, box.width)


def _arrays(boxes: Sequence[PlacedBox]) -> tuple[Float[np.ndarray, "n 4"], Float[np.ndarray, "n"]]:
  """Returns (corners, short sides of the images)."""
  corners = np.array([box.corners for box in boxes], np.float64)
  return corners, np.array([min(box.width, box.height) for box in boxes], np.float64)


def _beyond(boxes: Sequence[PlacedBox], sizes: bool) -> list[str]:
  """Returns a warning if many boxes reach beyond their image."""
  beyond = [box for box in boxes if reaches_beyond(box.corners, box.width, box.height)]
  if len(beyond) < max(2, _BEYOND * len(boxes)):
    return []
  said = f"{len(beyond)} of {len(boxes)} boxes reach beyond their image"
  first = f"(first: {beyond[0]})"
  if sizes and all(map(_fits_as_corners, boxes)):
    return [
      f"{said}, and none does if its numbers are corners [x1, y1, x2, y2] instead of [x, y, width, "
      f"height] {first}; write sizes, or use a source that reads corners."
    ]
  if all(map(_fits_exchanged, boxes)):
    return [
      f"{said}, and none does if its numbers are [y1, x1, y2, x2] instead of [x1, y1, x2, y2] "
      f"{first}; exchange them."
    ]
  largest = max(max(box.corners) for box in boxes)
  for scale, name in _SCALES:
    if largest <= scale * (1 + _ROUNDING):
      return [
        f"{said}, and no number exceeds {scale}: they look like {name} of the image, 0 to {scale}, "
        f"or like pixels of larger images {first}; convert them to pixels of the image files."
      ]
  return [f"{said}: they look like pixels of larger images {first}; scale them with the images."]


def _fits_as_corners(box: PlacedBox) -> bool:
  x1, y1, x2, y2 = box.corners
  width = x2 - x1
  height = y2 - y1
  return (
    width > x1
    and height > y1
    and not reaches_beyond((x1, y1, width, height), box.width, box.height)
  )


def _fits_exchanged(box: PlacedBox) -> bool:
  y1, x1, y2, x2 = box.corners
  return not reaches_beyond((x1, y1, x2, y2), box.width, box.height)


def _fixed_scale(boxes: Sequence[PlacedBox]) -> list[str]:
  """Returns a warning if boxes of large images fill a fixed range of numbers."""
  if len(boxes) < _MANY:
    return []
  corners, short = _arrays(boxes)
  reach = corners[:, 2:].max(0)
  for scale, name in _SCALES:
    if (
      reach.max() <= scale * (1 + _ROUNDING)
      and reach.min() >= 0.9 * scale
      and short.min() >= 1.5 * scale
    ):
      return [
        f"No number of {len(boxes)} boxes exceeds {scale}, though all images are larger: they look "
        f"like {name} of the image, 0 to {scale} (first: {boxes[0]}); convert them to pixels."
      ]
  return []
