"""Image transforms of visual grounding, which also change boxes and the words left and right.

Images are u8[H, W, 3], boxes f64[E, 4] corners (x1, y1, x2, y2) in pixels with exclusive ends.
Nothing is changed in place. Lengths of the official recipe, which is made for 336 pixels, are
shares of the canvas here.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageEnhance

Pixels: TypeAlias = UInt8[np.ndarray, "height width 3"]
Boxes: TypeAlias = Float[np.ndarray, "boxes 4"]

_CROP_TRIES = 20
_CROP_SHORT_SIDES = (400 / 336, 500 / 336, 600 / 336)  # short side of the image before a crop
_CROP_RANGE = (384 / 336, 600 / 336)  # sides of the crop
# Longer panoramas are not cropped: enlarged to a short side of 600 they would fill the memory.
_CROP_MAX_ASPECT = 8.0
_JITTER = (0.6, 1.4)
# "leftmost" and "right-hand" change sides, "bright" does not.
_ENDINGS = r"(?=(?:most|hand|side|wards?|ish|er|y|s)?\b)"


class Canvas(NamedTuple):
  """An image on a square canvas.

  Attributes:
    image: u8[S, S, 3], black outside `placed`.
    boxes: f64[E, 4] in pixels of the canvas.
    placed: (left, top, right, bottom) of the image on the canvas.
  """

  image: np.ndarray
  boxes: np.ndarray
  placed: tuple[int, int, int, int]


def resize(image: Pixels, boxes: Boxes, height: int, width: int) -> tuple[Pixels, Boxes]:
  """Resizes with Pillow's antialiased bilinear filter, as in the official pipeline.

  Args:
    image: RGB pixels.
    boxes: boxes in pixels.
    height: new height in pixels.
    width: new width in pixels.
  """
  scale = np.array([width / image.shape[1], height / image.shape[0]] * 2)
  if image.shape[:2] != (height, width):
    image = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
  return image, boxes * scale


def resize_to_side(
  image: Pixels, boxes: Boxes, size: int, side: Callable[[Sequence[int]], int] = max
) -> tuple[Pixels, Boxes]:
  """Resizes one side to `size`, and the other in proportion, to 1 pixel or more.

  Args:
    image: RGB pixels.
    boxes: boxes in pixels.
    size: in pixels.
    side: `max` for the long side, `min` for the short one.
  """
  factor = size / side(image.shape[:2])
  height, width = (max(1, round(factor * n)) for n in image.shape[:2])
  return resize(image, boxes, height, width)


def cut(
  image: Pixels, boxes: Boxes, top: int, left: int, height: int, width: int
) -> tuple[Pixels, Boxes]:
  """Cuts out a part of the image; boxes are clipped to it.

  Args:
    image: RGB pixels.
    boxes: boxes in pixels.
    top: first row of the part.
    left: first column of the part.
    height: of the part in pixels.
    width: of the part in pixels.
  """
  moved = boxes - np.array([left, top] * 2)
  return image[top : top + height, left : left + width], np.clip(moved, 0, [width, height] * 2)


def random_crop(
  image: Pixels,
  boxes: Boxes,
  rng: np.random.Generator,
  smallest: int,
  largest: int,
  official: bool = False,
) -> tuple[Pixels, Boxes]:
  """Cuts out a random part that keeps the center of every box.

  After 20 tries the result is the whole image.

  Args:
    image: RGB pixels.
    boxes: boxes in pixels.
    rng: source of all randomness.
    smallest: smallest side of the part in pixels.
    largest: largest side of the part in pixels.
    official: compare as the official code does, center x with the top and center y with the left
      (docs/official.md item 15), so that objects may be cut off.
  """
  height, width = image.shape[:2]
  x, y = (boxes[:, :2] + boxes[:, 2:]).T / 2
  for _ in range(_CROP_TRIES):
    h, w = (int(rng.integers(min(smallest, n), min(largest, n) + 1)) for n in (height, width))
    top = int(rng.integers(height - h + 1))
    left = int(rng.integers(width - w + 1))
    if official:
      kept = (x > top) & (y > left)
    else:
      kept = (x > left) & (x < left + w) & (y > top) & (y < top + h)
    if kept.all():
      return cut(image, boxes, top, left, h, w)
  return image, boxes


def _pattern(words, substrings):
  """Matches one of the words: anywhere, or as a whole word with its usual endings."""
  options = "(" + "|".join(map(re.escape, words)) + ")"
  return re.compile(options if substrings else rf"\b{options}{_ENDINGS}")


def mentions(text: str, words: Sequence[str], substrings: bool = False) -> bool:
  """Returns whether a text has one of the words.

  Args:
    text: the text.
    words: words to look for.
    substrings: also looks inside other words, as the official code does.
  """
  return bool(words) and bool(_pattern(words, substrings).search(text))


def swap_sides(text: str, substrings: bool = False) -> str:
  """Exchanges left and right in a text.

  Args:
    text: the text.
    substrings: also inside other words, so that "bright" becomes "bleft", as in the official code.
  """
  return _pattern(("left", "right"), substrings).sub(
    lambda m: {"left": "right", "right": "left"}[m[0]], text
  )


def mirror(image: Pixels, boxes: Boxes) -> tuple[Pixels, Boxes]:
  """Exchanges left and right; the texts need `swap_sides`.

  Args:
    image: RGB pixels.
    boxes: boxes in pixels.
  """
  boxes = boxes[:, [2, 1, 0, 3]]
  boxes[:, ::2] = image.shape[1] - boxes[:, ::2]
  return image[:, ::-1], boxes


def jitter_colors(image: Pixels, rng: np.random.Generator) -> Pixels:
  """Changes brightness, contrast and saturation in random order by factors of 0.6 to 1.4.

  Args:
    image: RGB pixels.
    rng: source of all randomness.
  """
  picture = Image.fromarray(image)
  enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
  for i in rng.permutation(3):
    picture = enhancers[i](picture).enhance(rng.uniform(*_JITTER))
  return np.array(picture)


def place(image: Pixels, boxes: Boxes, size: int, left: int, top: int) -> Canvas:
  """Puts an image on a black canvas.

  Args:
    image: RGB pixels.
    boxes: boxes in pixels.
    size: side of the canvas in pixels.
    left: column of the image's left edge.
    top: row of the image's top edge.
  """
  height, width = image.shape[:2]
  canvas = np.zeros((size, size, 3), np.uint8)
  canvas[top : top + height, left : left + width] = image
  return Canvas(canvas, boxes + np.array([left, top] * 2), (left, top, left + width, top + height))


def fit(image: Pixels, boxes: Boxes, size: int) -> Canvas:
  """Applies the evaluation transform: resizes the long side to `size` and centers the image.

  Args:
    image: RGB pixels.
    boxes: boxes in pixels.
    size: side of the canvas in pixels.
  """
  image, boxes = resize_to_side(image, boxes, size)
  top, left = (round((size - n) / 2 - 0.1) for n in image.shape[:2])
  return place(image, boxes, size, left, top)


def augment(
  image: Pixels,
  boxes: Boxes,
  texts: Sequence[str],
  size: int,
  rng: np.random.Generator,
  *,
  long_sides: Sequence[float],
  crop: float,
  official_crop: bool,
  jitter: float,
  flip: float,
  position_words: Sequence[str],
  official_words: bool,
) -> tuple[Canvas, Sequence[str]]:
  """Applies the training transform; all boxes and texts of the image change together.

  Args:
    image: RGB pixels.
    boxes: boxes in pixels.
    texts: expressions about the image.
    size: side of the canvas in pixels.
    rng: source of all randomness.
    long_sides: shares of the canvas; the image's long side becomes one of them, at random.
    crop: probability of an initial random crop, for images whose texts have none of
      `position_words`: "the top one" may no longer be the top one in a part of the image.
    official_crop: see `random_crop`.
    jitter: probability of `jitter_colors`.
    flip: probability of `mirror` with `swap_sides`.
    position_words: words that forbid a crop.
    official_words: looks for words inside other words as well, see `mentions` and `swap_sides`.

  Returns:
    Canvas with the image at a random position, and the texts.
  """
  height, width = image.shape[:2]
  positioned = any(mentions(text, position_words, official_words) for text in texts)
  if (
    not positioned
    and max(height, width) <= _CROP_MAX_ASPECT * min(height, width)
    and rng.random() < crop
  ):
    image, boxes = resize_to_side(image, boxes, round(size * rng.choice(_CROP_SHORT_SIDES)), min)
    smallest, largest = (round(size * share) for share in _CROP_RANGE)
    image, boxes = random_crop(image, boxes, rng, smallest, largest, official_crop)
  image, boxes = resize_to_side(image, boxes, round(size * rng.choice(long_sides)))
  if rng.random() < jitter:
    image = jitter_colors(image, rng)
  if rng.random() < flip:
    image, boxes = mirror(image, boxes)
    texts = [swap_sides(text, official_words) for text in texts]
  top, left = (int(rng.integers(size - n + 1)) for n in image.shape[:2])
  return place(image, boxes, size, left, top), texts
