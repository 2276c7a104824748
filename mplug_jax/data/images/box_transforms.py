"""Image transforms of visual grounding: every change of the image is made to its boxes, and to the words left and right.

Images are u8[H, W, 3], boxes f64[E, 4] corners (x1, y1, x2, y2) in pixels with exclusive ends.
Nothing is changed in place. Lengths of the official recipe, which is made for 336 pixels, are
shares of the canvas here.
"""

import re
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

_CROP_TRIES = 20
_CROP_SHORT_SIDES = (400 / 336, 500 / 336, 600 / 336)  # the image's short side before a random crop
_CROP_RANGE = (384 / 336, 600 / 336)  # sides of the crop
# longer panoramas are not cropped: enlarged to a short side of 600 they would fill the memory
_CROP_MAX_ASPECT = 8.0
_JITTER = (0.6, 1.4)
# "leftmost" and "right-hand" change sides, "bright" does not.
_ENDINGS = r"(?=(?:most|hand|side|wards?|ish|er|y|s)?\b)"


class Canvas(NamedTuple):
  """An image on a square canvas.

  image: u8[S, S, 3], black outside `placed`. boxes: f64[E, 4] in pixels of the canvas. placed:
    (left, top, right, bottom) of
  the image on it.
  """

  image: np.ndarray
  boxes: np.ndarray
  placed: tuple[int, int, int, int]


def resize(image, boxes, height, width):
  """Pillow's antialiased bilinear resize, as in the official pipeline."""
  scale = np.array([width / image.shape[1], height / image.shape[0]] * 2)
  if image.shape[:2] != (height, width):
    image = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
  return image, boxes * scale


def resize_to_side(image, boxes, size, side=max):
  """Proportions kept.

  The long side (`side=max`) or the short one (`min`) becomes `size` pixels, no side less than 1.
  """
  factor = size / side(image.shape[:2])
  return resize(image, boxes, *(max(1, round(factor * n)) for n in image.shape[:2]))


def cut(image, boxes, top, left, height, width):
  """A part of the image; boxes are cut off at its edges."""
  moved = boxes - np.array([left, top] * 2)
  return image[top : top + height, left : left + width], np.clip(moved, 0, [width, height] * 2)


def random_crop(image, boxes, rng, smallest, largest, official=False):
  """A random part of `smallest` to `largest` pixels a side that keeps the centre of every box.

  The whole image after 20 tries.

  Args:
    official: compare as the official code does, centre x with the top and centre y with the left
      (docs/official.md item 15), so that objects may be cut off.
  """
  height, width = image.shape[:2]
  x, y = (boxes[:, :2] + boxes[:, 2:]).T / 2
  for _ in range(_CROP_TRIES):
    h, w = (int(rng.integers(min(smallest, n), min(largest, n) + 1)) for n in (height, width))
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    if official:
      kept = (x > top) & (y > left)
    else:
      kept = (x > left) & (x < left + w) & (y > top) & (y < top + h)
    if kept.all():
      return cut(image, boxes, top, left, h, w)
  return image, boxes


def _pattern(words, substrings):
  """Matches one of the words: anywhere, or as a word of its own with its usual endings."""
  found = "(" + "|".join(map(re.escape, words)) + ")"
  return re.compile(found if substrings else rf"\b{found}{_ENDINGS}")


def mentions(text, words, substrings=False):
  """Whether a text has one of the words.

  `substrings`: inside another word counts too, as in the official code.
  """
  return bool(words) and bool(_pattern(words, substrings).search(text))


def swap_sides(text, substrings=False):
  """Left <-> right in a text.

  `substrings`: inside another word too, so that "bright" becomes "bleft", as in the official code.
  """
  return _pattern(("left", "right"), substrings).sub(
    lambda m: {"left": "right", "right": "left"}[m[0]], text
  )


def mirror(image, boxes):
  """Left and right exchanged; the texts need `swap_sides`."""
  boxes = boxes[:, [2, 1, 0, 3]]
  boxes[:, ::2] = image.shape[1] - boxes[:, ::2]
  return image[:, ::-1], boxes


def jitter_colors(image, rng):
  """Brightness, contrast and saturation changed in random order by factors of 0.6 to 1.4."""
  picture = Image.fromarray(image)
  enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
  for i in rng.permutation(3):
    picture = enhancers[i](picture).enhance(rng.uniform(*_JITTER))
  return np.array(picture)


def place(image, boxes, size, left, top):
  """The image on a black canvas of `size` pixels -> Canvas."""
  height, width = image.shape[:2]
  canvas = np.zeros((size, size, 3), np.uint8)
  canvas[top : top + height, left : left + width] = image
  return Canvas(canvas, boxes + np.array([left, top] * 2), (left, top, left + width, top + height))


def fit(image, boxes, size):
  """The evaluation transform: the long side becomes `size`, the image stands in the middle -> Canvas."""
  image, boxes = resize_to_side(image, boxes, size)
  top, left = (round((size - n) / 2 - 0.1) for n in image.shape[:2])
  return place(image, boxes, size, left, top)


def augment(
  image,
  boxes,
  texts,
  size,
  rng,
  *,
  long_sides,
  crop,
  official_crop,
  jitter,
  flip,
  position_words,
  official_words,
):
  """The training transform; all boxes and texts of the image are changed together.

  Args:
    size: S of the canvas. rng: source of all randomness.
    long_sides: shares of the canvas; the image's long side becomes one of them, at random.
    crop: probability of a random crop before, for images whose texts have none of `position_words`:
      "the top one" may no longer be the top one in a part of the image.
    official_crop: see `random_crop`.
    jitter, flip: probabilities of `jitter_colors`, of `mirror` with `swap_sides`.
    official_words: look for words inside other words as well, see `mentions` and `swap_sides`.

  Returns:
    (Canvas with the image at a random place, texts).
  """
  height, width = image.shape[:2]
  positioned = any(mentions(text, position_words, official_words) for text in texts)
  if (
    not positioned
    and max(height, width) <= _CROP_MAX_ASPECT * min(height, width)
    and rng.random() < crop
  ):
    image, boxes = resize_to_side(image, boxes, round(size * rng.choice(_CROP_SHORT_SIDES)), min)
    image, boxes = random_crop(
      image, boxes, rng, *(round(size * share) for share in _CROP_RANGE), official_crop
    )
  image, boxes = resize_to_side(image, boxes, round(size * rng.choice(long_sides)))
  if rng.random() < jitter:
    image = jitter_colors(image, rng)
  if rng.random() < flip:
    image, boxes = mirror(image, boxes)
    texts = [swap_sides(text, official_words) for text in texts]
  top, left = (int(rng.integers(size - n + 1)) for n in image.shape[:2])
  return place(image, boxes, size, left, top), texts
