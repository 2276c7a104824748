"""Counts of values that are not finite."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug_jax.tensor_files import finite

FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ml_dtypes.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
  positions=st.sets(st.integers(0, 299_999), max_size=6),
  value=st.sampled_from([np.nan, np.inf, -np.inf]),
  turned=st.booleans(),
)
def test_every_nan_and_infinity_is_counted(dtype, positions, value, turned):
  array = np.ones(300_000, dtype)  # more than a chunk
  array[list(positions)] = value
  array = array.reshape(600, 500)
  assert finite.count_nonfinite(array.T if turned else array) == len(positions)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_numbers_are_finite(dtype):
  largest = ml_dtypes.finfo(dtype).max
  assert finite.count_nonfinite(np.array([largest, -largest, 0], dtype)) == 0


@pytest.mark.parametrize(
  "array",
  [np.arange(5), np.array([True]), np.zeros((0, 3), np.float32), np.float32(1), np.uint16(0xFFFF)],
)
def test_other_arrays_have_none(array):
  assert finite.count_nonfinite(array) == 0


def test_a_checked_function_raises_with_the_name():
  good = np.ones(3, np.float32)
  assert finite.checked("a", lambda: good)() is good
  with pytest.raises(finite.NonFiniteError, match="^b has values that are not finite"):
    finite.checked("b", lambda: good * np.nan)()


def test_a_sentence_counts_values_and_names_ten_tensors():
  assert finite.describe({"a": 1}) == "1 value of 1 tensor is not finite: a (1)"
  counts = {f"t{i}": 1000 for i in range(12)}
  text = finite.describe(counts)
  assert text.startswith("12,000 values of 12 tensors are not finite: t0 (1,000), t1 (1,000)")
  assert text.endswith("t9 (1,000), ...")
