"""RandAugment's operations against Pillow and hand-computed results."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from mplug_jax.data.images import randaugment as ra


def _pictures():
  """Pictures u8[H, W, 3]: noise, low contrast, one color, few colors."""
  rng = np.random.default_rng(0)
  yield rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
  yield rng.integers(90, 140, (64, 64, 3), dtype=np.uint8)
  yield np.full((20, 20, 3), (7, 128, 255), np.uint8)
  yield rng.choice(np.array([0, 3, 250], np.uint8), (33, 21, 3))


def _pillow(image, operation):
  return np.asarray(operation(Image.fromarray(image)))


def test_auto_contrast_and_equalize_equal_pillow():
  for image in _pictures():
    np.testing.assert_array_equal(ra.auto_contrast(image), _pillow(image, ImageOps.autocontrast))
    np.testing.assert_array_equal(ra.equalize(image), _pillow(image, ImageOps.equalize))


@pytest.mark.parametrize("factor", [1.36, 1.9, 1.0, 0.1])
def test_brightness_and_sharpness_equal_pillow(factor):
  for image in _pictures():
    bright = _pillow(image, lambda picture: ImageEnhance.Brightness(picture).enhance(factor))
    np.testing.assert_array_equal(ra.brightness(image, factor), bright)
    sharp = _pillow(image, lambda picture: ImageEnhance.Sharpness(picture).enhance(factor))
    np.testing.assert_array_equal(ra.sharpness(image, factor), sharp)


def test_sharpness_wraps_on_request():
  image = np.full((5, 5, 3), 100, np.uint8)
  image[2, 2] = (255, 0, 100)
  # Smooth at the center: (8 * 100 + 5 v) / 13 -> 160, 62, 100; then smooth + 1.36 (v - smooth).
  assert ra.sharpness(image, 1.36)[2, 2].tolist() == [255, 0, 100]
  # 289.2 -> 289 - 256 and -22.32 -> -22 + 256.
  assert ra.sharpness(image, 1.36, wraps=True)[2, 2].tolist() == [33, 234, 100]
  # Neighbours: (12 * 100 + v) / 13 = 111.92 -> 112, so 112 - 1.36 * 12 = 95.68.
  assert ra.sharpness(image, 1.36)[1, 1, 0] == 95
  np.testing.assert_array_equal(ra.sharpness(image, 1.36)[0], image[0])


def test_translations_shift_by_whole_pixels_and_fill_with_gray():
  image = next(_pictures())
  left = ra.translate_x(image, 7)
  np.testing.assert_array_equal(left[:, :-7], image[:, 7:])
  assert (left[:, -7:] == 128).all()
  np.testing.assert_array_equal(ra.translate_x(image, -7)[:, 7:], image[:, :-7])
  up = ra.translate_y(image, 7)
  np.testing.assert_array_equal(up[:-7], image[7:])
  assert (up[-7:] == 128).all()


def test_shears_move_rows_and_columns_in_proportion():
  image = next(_pictures())
  right = ra.shear_x(image, 0.5)
  for y in (0, 10, 24):  # even rows move by whole pixels
    np.testing.assert_array_equal(right[y, y // 2 :], image[y, : 50 - y // 2])
    assert (right[y, : y // 2] == 128).all()
  # Row 1 moves by half a pixel: means of neighbors.
  mean = (image[1, :-1].astype(int) + image[1, 1:]) / 2
  assert np.abs(right[1, 1:] - mean).max() <= 1
  down = ra.shear_y(image, 0.5)
  np.testing.assert_array_equal(down, ra.shear_x(image.swapaxes(0, 1), 0.5).swapaxes(0, 1))


def test_rotation_turns_counter_clockwise_about_half_the_sides():
  image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
  turned = ra.rotate(image, 90)
  # The center is (4, 4), not (3.5, 3.5): (x, y) goes to (y, 8 - x), row 0 is filled.
  np.testing.assert_array_equal(turned[1:], np.rot90(image)[:-1])
  assert (turned[0] == 128).all()
  np.testing.assert_array_equal(ra.rotate(image, 0), image)
  dot = np.zeros((101, 101, 3), np.uint8)
  dot[50, 89:92, :] = dot[49:52, 90, :] = 255
  y, x = np.argwhere(ra.rotate(dot, 21)[..., 0] > 200).mean(0)
  radius = 39.5
  angle = np.radians(21)
  expected = 50.5 + radius * np.array([np.cos(angle), -np.sin(angle)])
  np.testing.assert_allclose((x, y), expected, atol=1)


class _Draws:
  """Replaces a generator: given operations and given uniform draws."""

  def __init__(self, names, uniform):
    self._numbers = [list(ra.OPERATIONS).index(name) for name in names]
    self._uniform = list(uniform)

  def integers(self, high):
    assert high == 10
    return self._numbers.pop(0)

  def random(self, size):
    return np.array([self._uniform.pop(0) for _ in range(size)])


@pytest.mark.parametrize(
  ("name", "low", "high"),
  [
    ("identity", lambda x: x, lambda x: x),
    ("auto_contrast", ra.auto_contrast, ra.auto_contrast),
    ("equalize", ra.equalize, ra.equalize),
    ("brightness", lambda x: ra.brightness(x, 1.36), lambda x: ra.brightness(x, 1.36)),
    ("sharpness", lambda x: ra.sharpness(x, 1.36), lambda x: ra.sharpness(x, 1.36)),
    ("shear_x", lambda x: ra.shear_x(x, 0.21), lambda x: ra.shear_x(x, -0.21)),
    ("shear_y", lambda x: ra.shear_y(x, 0.21), lambda x: ra.shear_y(x, -0.21)),
    ("translate_x", lambda x: ra.translate_x(x, 7), lambda x: ra.translate_x(x, -7)),
    ("translate_y", lambda x: ra.translate_y(x, 7), lambda x: ra.translate_y(x, -7)),
    ("rotate", lambda x: ra.rotate(x, 21), lambda x: ra.rotate(x, -21)),
  ],
)
def test_magnitude_7_of_each_operation(name, low, high):
  image = next(_pictures())
  for sign, expected in ((0.2, low), (0.8, high)):
    # First operation applied, second drawn but not applied.
    rng = _Draws([name, "rotate"], [0.3, sign, 0.6, 0.2])
    np.testing.assert_array_equal(ra.rand_augment(image, rng, 2, 7), expected(image))


def test_operations_are_composed_and_sharpness_gets_the_wrap_option():
  image = next(_pictures())
  rng = _Draws(["rotate", "sharpness"], [0.1, 0.1, 0.1, 0.1])
  expected = ra.sharpness(ra.rotate(image, 21), 1.36, wraps=True)
  np.testing.assert_array_equal(ra.rand_augment(image, rng, 2, 7, sharpness_wraps=True), expected)


def test_half_of_ten_operations_are_applied():
  rng = np.random.default_rng(0)
  image = next(_pictures())[:20, :20]
  changed = sum(not np.array_equal(ra.rand_augment(image, rng, 1), image) for _ in range(2000))
  # Noise over the full range: identity never shows, the contrast stretch may not.
  expected = sum(not np.array_equal(f(image), image) for f in (ra.auto_contrast, ra.equalize)) + 7
  assert abs(changed / 2000 - 0.5 * expected / 10) < 0.04


def test_magnitude_is_checked():
  with pytest.raises(ValueError, match="0..10, got 11"):
    ra.rand_augment(np.zeros((4, 4, 3), np.uint8), np.random.default_rng(0), 2, 11)
