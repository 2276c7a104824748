"""Boxes against counted pixels, and the bins of location tokens at their edges."""

import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.data import boxes


def pairs(count=200, size=12):
  """Whole corners i64[N, 4] twice, inside a square of `size`."""
  draws = np.random.default_rng(0).integers(0, size, (2, count, 2, 2))
  draws.sort(axis=2)
  draws[:, :, 1] += 1
  return draws.reshape(2, count, 4).astype(np.float64)


def mask(box, size=13):
  out = np.zeros((size, size), bool)
  x1, y1, x2, y2 = box.astype(int)
  out[y1:y2, x1:x2] = True
  return out


def test_iou_and_generalized_iou_equal_counted_pixels():
  a, b = pairs()
  for first, second, iou, generalized in zip(a, b, boxes.iou(a, b), boxes.generalized_iou(a, b)):
    both = (mask(first) & mask(second)).sum()
    either = (mask(first) | mask(second)).sum()
    hull = mask(
      np.concatenate([np.minimum(first, second)[:2], np.maximum(first, second)[2:]])
    ).sum()
    assert iou == pytest.approx(both / either, abs=1e-12)
    # The official denominators have 1e-5 more.
    assert generalized == pytest.approx(
      both / (either + 1e-5) - (hull - either) / (hull + 1e-5), abs=1e-12
    )


def test_iou_of_equal_distant_and_empty_boxes():
  box, far, empty = np.array([[0.1, 0.1, 0.3, 0.4], [0.9, 0.9, 0.95, 0.95], [0.2, 0.2, 0.2, 0.2]])
  assert boxes.iou(box, box) == 1
  assert boxes.generalized_iou(box, box) == pytest.approx(1, abs=1e-3)
  assert boxes.iou(box, far) == 0
  assert -1 <= boxes.generalized_iou(box, far) < -0.8
  assert boxes.iou(empty, empty) == 0
  assert np.isfinite(boxes.generalized_iou(empty, empty))
  exchanged = box[[2, 3, 0, 1]]
  assert boxes.iou(exchanged, box) == 0  # not the square of a negative width


def test_jax_and_numpy_agree():
  a, b = pairs().astype(np.float32) / 12
  for function in (boxes.iou, boxes.generalized_iou):
    result = function(jnp.asarray(a), jnp.asarray(b))
    assert isinstance(result, jnp.ndarray)
    np.testing.assert_allclose(result, function(a, b), rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(boxes.quantize(jnp.asarray(a), 336), boxes.quantize(a, 336))
  np.testing.assert_allclose(
    boxes.dequantize(jnp.arange(337), 336), boxes.dequantize(np.arange(337), 336), rtol=1e-6
  )


def test_corners_and_centers_are_inverse():
  a, _ = pairs()
  centered = boxes.to_centered(a)
  np.testing.assert_array_equal(
    centered[0],
    [(a[0, 0] + a[0, 2]) / 2, (a[0, 1] + a[0, 3]) / 2, a[0, 2] - a[0, 0], a[0, 3] - a[0, 1]],
  )
  np.testing.assert_allclose(boxes.to_corners(centered), a)


def test_bins_round_down_and_both_ends_have_one():
  shares = np.array([-0.2, 0.0, 0.0029, 0.00298, 0.5, 0.99999, 1.0, 3.0])
  np.testing.assert_array_equal(boxes.quantize(shares, 336), [0, 0, 0, 1, 168, 335, 336, 336])
  numbers = np.arange(337)
  np.testing.assert_array_equal(
    boxes.quantize(boxes.dequantize(numbers, 336) + np.float32(1e-6), 336), numbers
  )
  inside = np.random.default_rng(1).random(1000)
  lost = inside - boxes.dequantize(boxes.quantize(inside, 48), 48)
  assert lost.min() > -1e-6
  assert lost.max() < 1 / 48
  np.testing.assert_array_equal(
    boxes.quantize(shares, 336, "nearest"), [0, 0, 1, 1, 168, 336, 336, 336]
  )
  lost = inside - boxes.dequantize(boxes.quantize(inside, 48, "nearest"), 48)
  assert lost.min() + 0.5 / 48 > -1e-6
  assert lost.max() < 0.5 / 48 + 1e-6
  assert abs(lost.mean()) < 1e-3


def test_boxes_are_cut_at_the_edges_of_their_image():
  corners = np.array(
    [[-5.0, -146.7, 25.0, -13.3], [3.0, 4.0, 30.0, 8.0], [50.0, 4.0, 60.0, 8.0]], np.float32
  )
  cut = [[0, 0, 25, 0], [3, 4, 30, 8], [40, 4, 40, 8]]
  np.testing.assert_array_equal(boxes.cut(corners, np.array([40, 20])), cut)
  np.testing.assert_array_equal(boxes.cut(jnp.asarray(corners), jnp.array([40, 20])), cut)
