"""Units of boxes: which boxes are implausible, and that ordinary ones are not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug_jax.data.check import box_units
from mplug_jax.data.check.box_units import PlacedBox

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)


def placed(corners, width=60, height=40, **options):
  return PlacedBox("a.png", "the dog", tuple(map(float, corners)), width, height, **options)


@st.composite
def boxes_in_pixels(draw, smallest=1, sides=(50, 4000), count=(1, 25), whole=None):
  """Boxes inside images of ordinary sizes, whole numbers or with fractions."""
  whole = draw(st.booleans()) if whole is None else whole
  boxes = []
  for _ in range(draw(st.integers(*count))):
    width, height = (draw(st.integers(*sides)) for _ in range(2))
    number = st.integers if whole else st.floats
    x, y = (draw(number(0, side - smallest)) for side in (width, height))
    w = draw(number(smallest, width - x))
    h = draw(number(smallest, height - y))
    boxes.append(placed((x, y, x + w, y + h), width, height))
  return boxes


@PROPERTY
@given(boxes_in_pixels())
def test_boxes_inside_their_images_are_plausible(boxes):
  assert box_units.warnings(boxes) == []
  assert box_units.warnings(boxes, sizes=True) == []


@PROPERTY
@given(boxes_in_pixels(smallest=4, count=(1, 12)))
def test_the_same_boxes_as_shares_are_not(boxes):
  shares = [
    box._replace(
      corners=tuple(np.divide(box.corners, (box.width, box.height, box.width, box.height)))
    )
    for box in boxes
  ]
  if all(x in (0, 1) for box in shares for x in box.corners):
    return  # whole images, which could be pixels
  (sentence,) = box_units.warnings(shares)
  assert f"{len(boxes)} of {len(boxes)} boxes lie within one pixel" in sentence
  assert "look like shares of the image, 0 to 1 (first: (" in sentence


@settings(PROPERTY, max_examples=40)
@given(boxes_in_pixels(smallest=40, sides=(80, 640), count=(3, 12)))
def test_boxes_per_mille_of_smaller_images_are_not(boxes):
  scaled = []
  for box in boxes:
    x1, y1, x2, y2 = box.corners
    # Ordinary boxes reach into the right or lower half of some image.
    x2 = max(x2, 0.9 * box.width)
    factors = np.array([1000 / box.width, 1000 / box.height] * 2)
    scaled.append(box._replace(corners=tuple(np.array((x1, y1, x2, y2)) * factors)))
  (sentence,) = box_units.warnings(scaled)
  assert (
    "reach beyond their image, and no number exceeds 1000: they look like per mille" in sentence
  )


def test_a_sentence_has_the_numbers_and_the_first_example():
  boxes = [placed((0.1, 0.2, 0.6, 0.7))] * 4
  assert box_units.warnings(boxes) == [
    "4 of 4 boxes lie within one pixel: they look like shares of the image, 0 to 1 (first: (0.1, "
    "0.2, 0.6, 0.7) of 'the dog' in a.png of 60 x 40 pixels); multiply x by the width and y by the "
    "height."
  ]


def test_one_box_of_shares_is_enough_and_a_few_among_thousands_are_not():
  assert box_units.warnings([placed((0.1, 0.2, 0.6, 1.0))])
  ordinary = [placed((5, 5, 30, 20))]
  assert box_units.warnings([placed((0.1, 0.2, 0.6, 1.0)), *ordinary * 50])
  assert not box_units.warnings([placed((0.1, 0.2, 0.6, 1.0)), *ordinary * 500])


@pytest.mark.parametrize(
  ("largest", "said"),
  [
    (95, "they look like percent of the image, 0 to 100"),
    (990, "they look like per mille of the image, 0 to 1000"),
    (1800, "they look like pixels of larger images"),
  ],
)
def test_boxes_beyond_their_images_name_the_likely_unit(largest, said):
  boxes = [placed((0, 0, largest, largest))] * 2 + [placed((1, 1, 20, 20))] * 3
  (sentence,) = box_units.warnings(boxes)
  assert sentence.startswith("2 of 5 boxes reach beyond their image")
  assert said in sentence


def test_few_or_slightly_larger_boxes_are_plausible():
  ordinary = [placed((1, 1, 20, 20))] * 30
  assert not box_units.warnings([*ordinary, placed((0, 0, 61.4, 41)), placed((0, 0, 61, 40.5))])
  assert not box_units.warnings([*ordinary, placed((100, 100, 120, 130))])


@pytest.mark.parametrize(("scale", "name"), [(100, "percent"), (1000, "per mille")])
def test_numbers_of_a_fixed_range_in_large_images(scale, name):
  corners = [
    (x, y, x + 0.3 * scale, y + 0.3 * scale)
    for x, y in np.random.default_rng(0).uniform(0, 0.7 * scale, (40, 2))
  ]
  boxes = [placed(box, 4 * scale, 3 * scale) for box in corners]
  (sentence,) = box_units.warnings(boxes)
  assert f"they look like {name} of the image, 0 to {scale}" in sentence
  assert not box_units.warnings(boxes[:10])
  assert not box_units.warnings([*boxes, placed((0, 0, 2 * scale, 20), 4 * scale, 3 * scale)])


def test_corners_that_a_source_of_sizes_reads():
  corners = [(15, 5, 55, 35), (20, 10, 58, 38), (5, 5, 30, 20)]
  read = [placed((x1, y1, x1 + x2, y1 + y2)) for x1, y1, x2, y2 in corners]
  (sentence,) = box_units.warnings(read, sizes=True)
  assert "none does if its numbers are corners [x1, y1, x2, y2] instead of [x, y, width" in sentence
  assert "corners" not in box_units.warnings(read, sizes=False)[0]


def test_boxes_with_y_before_x():
  wide = [(30, 5, 58, 38), (35, 10, 55, 20), (5, 5, 30, 20)]  # of images of 60 x 40 pixels
  boxes = [placed((y1, x1, y2, x2)) for x1, y1, x2, y2 in wide]
  (sentence,) = box_units.warnings(boxes)
  assert sentence.startswith(
    "2 of 3 boxes reach beyond their image, and none does if its numbers are [y1, x1, y2, x2] "
    "instead of [x1, y1, x2, y2] (first: (5, 30, 38, 58) of 'the dog'"
  )


def test_boxes_drawn_in_the_stored_frame_of_a_turned_image():
  # Stored 60 x 40, shown 40 x 60.
  fits_both = placed((5, 5, 30, 20), 40, 60, turned=True)
  stored_only = placed((30, 5, 58, 38), 40, 60, turned=True)
  assert not box_units.warnings([fits_both] * 5)
  (sentence,) = box_units.warnings([fits_both, stored_only])
  assert sentence.startswith(
    "1 of 2 boxes fit their image as it is stored, but not as its EXIF orientation shows it"
  )
  assert "(30, 5, 58, 38) of 'the dog' in a.png of 40 x 60 pixels" in sentence
