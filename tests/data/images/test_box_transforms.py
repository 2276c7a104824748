"""Transforms of images with boxes: boxes follow painted rectangles, texts follow mirroring."""

import numpy as np
import pytest

from mplug_jax.data.images import box_transforms
from tests.support.grounding_files import frame_of, painted

OPTIONS = dict(
  long_sides=(1.0, 0.9, 0.75),
  crop=0.5,
  official_crop=False,
  jitter=0.0,
  flip=0.5,
  position_words=("left", "right", "top", "bottom", "middle"),
  official_words=False,
)
# A wide image, so that the canvas has bars; the rectangles are large enough to survive resizing.
IMAGE = painted(180, 240, red=(20, 30, 80, 70), blue=(150, 100, 210, 170))
BOXES = np.array([(20, 30, 80, 70), (150, 100, 210, 170)], np.float64)


def augment(
  seed, texts=("the red one", "the blue one"), image=IMAGE, boxes=BOXES, size=112, **options
):
  return box_transforms.augment(
    image, boxes, list(texts), size, np.random.default_rng(seed), **(OPTIONS | options)
  )


def test_boxes_follow_their_objects():
  """Two boxes are resized, cropped, mirrored and placed together."""
  cut = 0
  mirrored = 0
  places = set()
  for seed in range(200):
    canvas, texts = augment(seed)
    assert canvas.image.shape == (112, 112, 3)
    assert canvas.image.dtype == np.uint8
    assert texts == ["the red one", "the blue one"]
    for color, box in zip(("red", "blue"), canvas.boxes):
      assert np.abs(np.subtract(frame_of(canvas.image, color), box)).max() <= 1.01, (seed, color)
    left, top, right, bottom = canvas.placed
    assert canvas.image[top:bottom, left:right].any(-1).all()
    outside = canvas.image.copy()
    outside[top:bottom, left:right] = 0
    assert not outside.any()
    cut += abs((right - left) / (bottom - top) - 240 / 180) > 0.05
    mirrored += canvas.boxes[0, 0] > canvas.boxes[1, 0]
    places.add(canvas.placed)
  assert cut > 50
  assert 70 < mirrored < 130
  assert len(places) > 100
  np.testing.assert_array_equal(
    BOXES, [(20, 30, 80, 70), (150, 100, 210, 170)]
  )  # not changed in place


def test_crop_keeps_the_center_of_every_box_unlike_the_official_crop():
  image = painted(120, 200, red=(2, 80, 40, 118))
  boxes = np.array([(2, 80, 40, 118.0)])
  lost = {False: 0, True: 0}
  for official in lost:
    for seed in range(300):
      part, moved = box_transforms.random_crop(
        image, boxes, np.random.default_rng(seed), 60, 110, official
      )
      assert part.shape[0] <= 120
      assert 60 <= part.shape[1] <= 200
      middle = (moved[0, 0] + moved[0, 2]) / 2, (moved[0, 1] + moved[0, 3]) / 2
      visible = frame_of(part, "red")
      if visible is not None:
        np.testing.assert_array_equal(visible, moved[0])
      if visible is None or moved[0, 2] - moved[0, 0] < 19 or moved[0, 3] - moved[0, 1] < 19:
        lost[official] += 1
      assert official or (0 < middle[0] < part.shape[1] and 0 < middle[1] < part.shape[0])
  assert lost[False] == 0
  assert lost[True] > 20


def test_no_crop_if_the_boxes_fit_in_none():
  boxes = np.array([(0, 0, 10, 10), (90, 90, 100, 100.0)])
  image, moved = box_transforms.random_crop(
    np.zeros((100, 100, 3), np.uint8), boxes, np.random.default_rng(0), 20, 30
  )
  assert image.shape == (100, 100, 3)
  np.testing.assert_array_equal(moved, boxes)


@pytest.mark.parametrize(
  ("text", "crops"),
  [
    ("the top box", False),
    ("rightmost red box", False),
    ("the one at the bottom", False),
    ("the bright box", True),
    ("stop sign", True),
    ("the red box", True),
  ],
)
def test_position_words_forbid_crops(text, crops):
  canvases = [
    augment(seed, ("the blue box", text), crop=1.0, long_sides=(1.0,))[0] for seed in range(20)
  ]
  uncropped = [
    c.placed[2] - c.placed[0] == 112 and c.placed[3] - c.placed[1] == 84 for c in canvases
  ]
  assert all(uncropped) == (not crops)
  if text in ("the bright box", "stop sign"):  # the official code looks inside words
    assert all(
      c.placed[3] - c.placed[1] == 84
      for c, _ in (
        augment(seed, (text, ""), crop=1.0, long_sides=(1.0,), official_words=True)
        for seed in range(5)
      )
    )


@pytest.mark.parametrize(
  ("text", "swapped"),
  [
    ("the star to the left of the red star", "the star to the right of the red star"),
    ("left of the disc", "right of the disc"),
    ("on the right side of it", "on the left side of it"),
    ("leftmost, not right-hand", "rightmost, not left-hand"),
    ("bright copyright", "bright copyright"),
    ("", ""),
  ],
)
def test_sides_are_swapped_in_whole_words(text, swapped):
  assert box_transforms.swap_sides(text) == swapped
  assert box_transforms.swap_sides(swapped) == text


def test_official_swap_changes_parts_of_words():
  assert box_transforms.swap_sides("bright left", substrings=True) == "bleft right"


def test_every_text_of_a_mirrored_image_is_swapped():
  for seed in range(20):
    canvas, texts = augment(seed, ("the red box left of the blue one", "the box on the right"))
    flipped = canvas.boxes[0, 0] > canvas.boxes[1, 0]
    expected = (
      ["the red box right of the blue one", "the box on the left"]
      if flipped
      else ["the red box left of the blue one", "the box on the right"]
    )
    assert texts == expected


def test_evaluation_centers_the_image():
  canvas = box_transforms.fit(IMAGE, BOXES, 112)
  assert canvas.placed == (0, 14, 112, 98)  # 240 x 180 -> 112 x 84
  np.testing.assert_allclose(canvas.boxes, BOXES * (112 / 240) + [0, 14, 0, 14])
  # An odd rest leaves the smaller half above: round(dh / 2 - 0.1).
  assert box_transforms.fit(np.zeros((7, 10, 3), np.uint8), np.zeros((0, 4)), 10).placed == (
    0,
    1,
    10,
    8,
  )
  square = painted(64, 64, red=(3, 4, 20, 30))
  np.testing.assert_array_equal(box_transforms.fit(square, np.zeros((0, 4)), 64).image, square)


def test_color_jitter_moves_nothing():
  changed = box_transforms.jitter_colors(IMAGE, np.random.default_rng(0))
  assert changed.shape == IMAGE.shape
  assert (changed != IMAGE).any()
  again = box_transforms.jitter_colors(IMAGE, np.random.default_rng(0))
  np.testing.assert_array_equal(changed, again)
  assert (
    len(np.unique(changed.reshape(-1, 3), axis=0)) == 3
  )  # gray, red and blue are still three areas
  constant = np.full((9, 9, 3), 200, np.uint8)
  assert (
    len(
      np.unique(
        box_transforms.jitter_colors(constant, np.random.default_rng(1)).reshape(-1, 3), axis=0
      )
    )
    == 1
  )


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 2), (5, 5)])
def test_images_of_any_shape_fit(shape):
  image = np.full((*shape, 3), 77, np.uint8)
  boxes = np.array([[0, 0, shape[1], shape[0]]], np.float64)
  for seed in range(5):
    for canvas in (
      augment(seed, ("it",), image, boxes, 32, crop=1.0)[0],
      box_transforms.fit(image, boxes, 32),
    ):
      left, top, right, bottom = canvas.placed
      assert 0 <= left < right <= 32
      assert 0 <= top < bottom <= 32
      assert np.isfinite(canvas.boxes).all()
