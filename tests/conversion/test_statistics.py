"""Statistics of arrays and of their differences, chunk by chunk."""

import math

import numpy as np
import pytest

from mplug_jax.conversion.inspect import statistics
from mplug_jax.conversion.inspect.statistics import Moments, difference, moments


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "uint8", "bool"])
def test_moments_are_numpys_across_chunks(dtype, monkeypatch):
  monkeypatch.setattr(statistics, "_CHUNK", 7)
  x = (np.random.default_rng(0).normal(size=(5, 9)) * 50).astype(dtype)
  wide = x.astype(np.float64)
  result = moments(x)
  np.testing.assert_allclose(
    [result.count, result.mean, result.std, result.bad],
    [45, wide.mean(), wide.std(), 0],
    rtol=1e-12,
  )


def test_moments_of_odd_arrays(monkeypatch):
  monkeypatch.setattr(statistics, "_CHUNK", 2)
  assert moments(np.array([np.nan, np.inf, 3.0, -np.inf, 5.0])) == Moments(2, 4.0, 2.0, 3)
  assert moments(np.zeros((0, 4))) == Moments()
  assert math.isnan(Moments().std)
  assert (
    moments(np.full(1000, 1e8 + 1, np.float64)).std == 0.0
  )  # a difference of squares would not see it


def test_differences_of_arrays(monkeypatch):
  monkeypatch.setattr(statistics, "_CHUNK", 2)
  result = difference(np.float32([3, 0, 4]), np.float32([3, 1, 2]))
  assert result.max == 2
  assert result.relative == pytest.approx(math.sqrt(5) / 5)
  assert difference(np.float32([np.nan, np.inf, 1]), np.float32([np.nan, np.inf, 1])).max == 0
  assert (
    difference(np.float32([np.nan, 1]), np.float32([0, 1])).max
    == math.inf
    == difference(np.float32([1]), np.float32([np.inf])).max
  )
  assert difference(np.zeros(2), np.ones(2)).relative == math.inf
