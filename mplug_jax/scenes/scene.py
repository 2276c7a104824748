"""Procedural scenes of colored shapes: descriptions sampled from (seed, split, index).

Nothing is stored: `scene(config, split, index)` samples the description, `rendering.render` draws
the pixels. Difficulties:

- `default`: 96 px, 2-4 objects, 4 shapes x 6 colors x 2 sizes, light background noise, no overlap;
- `hard`: 128 px, 3-6 objects, 6 shapes x 8 colors x 2 sizes, textured backgrounds, overlap <= 20%.

Every scene has two objects that share exactly one of shape and color (a distractor for referring
expressions) and no two objects of equal size, color and shape. The (shape, color) pairs of
`HELD_OUT` occur in images and texts of the test split only.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import numpy as np

from mplug_jax.scenes.shapes import object_mask

SPLITS = {"train": 20_000, "val": 1_000, "test": 1_000}
SIZES = ("small", "large")
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")  # default: the first 4
COLORS = {  # default: the first 6
  "red": (214, 40, 40),
  "green": (36, 156, 58),
  "blue": (38, 84, 214),
  "yellow": (240, 208, 32),
  "purple": (138, 44, 172),
  "orange": (244, 132, 26),
  "pink": (246, 140, 196),
  "black": (24, 24, 24),
}
# One different color per shape, so that all shapes are equally frequent in training.
HELD_OUT = frozenset(
  {
    ("circle", "orange"),
    ("square", "purple"),
    ("triangle", "green"),
    ("star", "blue"),
    ("diamond", "red"),
    ("cross", "yellow"),
  }
)
MAX_COUNT = 3  # "how many ...?" has the answers 0..MAX_COUNT
MIN_SIZE = 48

_DIFFICULTIES = {  # canvas in px, fewest and most objects, shapes, colors, largest overlap
  "default": (96, 2, 4, 4, 6, 0.0),
  "hard": (128, 3, 6, 6, 8, 0.2),
}
# Half extents as a fraction of the canvas; the two ranges are far apart.
_RADII = {"small": (0.070, 0.088), "large": (0.125, 0.150)}
_STREAMS = (
  "scene",
  "background",
  "captions",
  "questions",
  "referring",
  "pair",
  "entailment",
  "clip",
)


@dataclasses.dataclass(frozen=True)
class SceneConfig:
  """Settings of a data set of scenes.

  Attributes:
    size: side of the square canvas in pixels, >= 48; None = the difficulty's (96 or 128).
    seed: 0 <= seed < 2**63; each seed gives a different data set.
    difficulty: "default" or "hard".
  """

  size: int | None = None
  seed: int = 0
  difficulty: str = "default"

  def __post_init__(self):
    if self.difficulty not in _DIFFICULTIES:
      raise ValueError(
        f"Scene difficulty {self.difficulty!r} is unknown; use one of {sorted(_DIFFICULTIES)}."
      )
    if self.size is None:
      object.__setattr__(self, "size", _DIFFICULTIES[self.difficulty][0])
    assert self.size is not None
    if self.size < MIN_SIZE:
      raise ValueError(
        f"Scene size {self.size} px is too small to tell shapes apart; use >= {MIN_SIZE}."
      )
    if not 0 <= self.seed < 2**63:
      raise ValueError(f"Scene seed {self.seed} is out of range; use 0 <= seed < 2**63.")

  @property
  def shapes(self) -> tuple[str, ...]:
    """Shapes that this difficulty uses."""
    return SHAPES[: _DIFFICULTIES[self.difficulty][3]]

  @property
  def colors(self) -> tuple[str, ...]:
    """Colors that this difficulty uses."""
    return tuple(COLORS)[: _DIFFICULTIES[self.difficulty][4]]

  @property
  def margin(self) -> float:
    """Distance of two centers in pixels from which a spatial relation is unambiguous."""
    assert self.size is not None
    return 0.08 * self.size


class Object(NamedTuple):
  """One object of a scene.

  Attributes:
    size: one of SIZES.
    color: key of COLORS.
    shape: one of SHAPES.
    box: (x1, y1, x2, y2) in pixels, x2 and y2 exclusive, tight around the whole object (in `hard`,
      later objects may cover up to 20% of it).
    radius: half extent in pixels.
    rgb: color of the pixels, 0 to 255.
  """

  size: str
  color: str
  shape: str
  box: tuple[int, int, int, int]
  radius: int
  rgb: tuple[int, int, int]

  @property
  def center(self) -> tuple[float, float]:
    """(x, y) of the center of the box in pixels, x to the right, y down."""
    return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

  @property
  def held_out(self) -> bool:
    """True for a (shape, color) pair that training never shows."""
    return (self.shape, self.color) in HELD_OUT


class Scene(NamedTuple):
  """Description of one image.

  Attributes:
    config: settings of the data set.
    split: "train", "val" or "test".
    index: number of the scene in its split.
    objects: in drawing order.
    theme: (attribute, value) of the counting question.
  """

  config: SceneConfig
  split: str
  index: int
  objects: tuple[Object, ...]
  theme: tuple[str, str]

  @property
  def unseen(self) -> bool:
    """True if the image shows a (shape, color) pair that is held out from training."""
    return any(o.held_out for o in self.objects)


def split_size(split: str) -> int:
  """Returns the number of scenes in a split.

  Raises:
    ValueError: the split is unknown.
  """
  if split not in SPLITS:
    raise ValueError(f"Scene split {split!r} is unknown; use one of {list(SPLITS)}.")
  return SPLITS[split]


def generator(config: SceneConfig, split: str, index: int, stream: str) -> np.random.Generator:
  """Returns the counter-based random generator of one stream of one record.

  Raises:
    IndexError: not 0 <= index < split_size(split).
  """
  if not 0 <= index < split_size(split):
    raise IndexError(f"Scene {index} is not in split {split!r} of {split_size(split)} scenes.")
  word = (list(SPLITS).index(split) << 56) | (_STREAMS.index(stream) << 48) | index
  return np.random.Generator(np.random.Philox(key=np.array([config.seed, word], np.uint64)))


@functools.cache
def allowed_pairs(config: SceneConfig, split: str) -> tuple[tuple[str, str], ...]:
  """Returns all (shape, color) pairs that images and texts of a split may use."""
  pairs = itertools.product(config.shapes, config.colors)
  return tuple(p for p in pairs if split == "test" or p not in HELD_OUT)


@functools.cache
def _themed_pairs(config, split, theme, inside):
  attribute, value = theme
  column = ("shape", "color").index(attribute)
  return [p for p in allowed_pairs(config, split) if (p[column] == value) == inside]


def _draw_attributes(rng, config, split, theme, themed, count):
  """Draws `count` of (size, color, shape), exactly `themed` of them with the theme's value."""
  inside, outside = (_themed_pairs(config, split, theme, flag) for flag in (True, False))
  while True:  # theme and counts stay fixed over rejections: their distribution is exact
    draws = rng.random((count, 2)).tolist()
    attributes = []
    for i, (u, v) in enumerate(draws):
      pairs = inside if i < themed else outside
      shape, color = pairs[int(u * len(pairs))]
      attributes.append((SIZES[v < 0.5], color, shape))
    if len(set(attributes)) == count and any(
      (a[1] == b[1]) != (a[2] == b[2]) for a, b in itertools.combinations(attributes, 2)
    ):
      return attributes


def _intersection(a, b):
  x1 = max(a[0], b[0])
  y1 = max(a[1], b[1])
  x2 = min(a[2], b[2])
  y2 = min(a[3], b[3])
  return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def overlap(a: Object, b: Object) -> float:
  """Returns the overlap of two objects, 0.0 if they are apart.

  The larger of two fractions: shared box area of the smaller box, shared pixels of the smaller
  object.
  """
  shared = _intersection(a.box, b.box)
  if shared is None:
    return 0.0
  x1, y1, x2, y2 = shared
  masks = [object_mask(o.shape, o.radius) >= 0.5 for o in (a, b)]
  views = [
    m[y1 - o.box[1] : y2 - o.box[1], x1 - o.box[0] : x2 - o.box[0]]
    for m, o in zip(masks, (a, b), strict=True)
  ]
  boxes = (x2 - x1) * (y2 - y1) / min(m.size for m in masks)
  pixels = np.logical_and(*views).sum() / min(m.sum() for m in masks)
  return float(max(boxes, pixels))


def _fits(candidate, placed, config):
  """Returns whether overlaps are allowed and all spatial relations are unambiguous."""
  limit = _DIFFICULTIES[config.difficulty][5]
  x1, y1, x2, y2 = candidate.box
  x, y = candidate.center
  for other in placed:
    if limit and overlap(candidate, other) > limit:
      return False
    if not limit and _intersection((x1 - 2, y1 - 2, x2 + 2, y2 + 2), other.box):
      return False
    if max(abs(x - other.center[0]), abs(y - other.center[1])) <= config.margin:
      return False
  return True


def _place(rng, config, attributes):
  """Returns objects at random positions that keep the difficulty's overlap limit."""
  while True:
    placed = []
    for size, color, shape in attributes:
      low, high = (round(f * config.size) for f in _RADII[size])
      radius = int(rng.integers(low, high + 1))
      height, width = object_mask(shape, radius).shape
      shades = zip(COLORS[color], rng.integers(-12, 13, 3).tolist(), strict=True)
      red, green, blue = (min(max(value + change, 0), 255) for value, change in shades)
      rgb = (red, green, blue)
      for u, v in rng.random((24, 2)).tolist():
        x = 1 + int(u * (config.size - 1 - width))
        y = 1 + int(v * (config.size - 1 - height))
        candidate = Object(size, color, shape, (x, y, x + width, y + height), radius, rgb)
        if _fits(candidate, placed, config):
          placed.append(candidate)
          break
      else:
        break
    if len(placed) == len(attributes):
      return tuple(placed)


def scene(config: SceneConfig, split: str, index: int) -> Scene:
  """Returns the description of scene `index` of a split.

  The counting question is drawn first (attribute, value and number, all uniform), then objects
  that fit it, so its answer is uniform for every wording.

  Raises:
    ValueError: the split is unknown.
    IndexError: not 0 <= index < split_size(split).
  """
  rng = generator(config, split, index, "scene")
  fewest, most = _DIFFICULTIES[config.difficulty][1:3]
  attribute = ("shape", "color")[rng.integers(2)]
  values = config.shapes if attribute == "shape" else config.colors
  theme = (attribute, values[rng.integers(len(values))])
  themed = int(rng.integers(MAX_COUNT + 1))
  count = int(rng.integers(max(fewest, themed), most + 1))
  attributes = _draw_attributes(rng, config, split, theme, themed, count)
  order = rng.permutation(count)
  objects = _place(rng, config, [attributes[i] for i in order])
  return Scene(config, split, index, objects, theme)
