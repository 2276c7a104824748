"""JSON text without NaN and Infinity."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug_jax.runtime import atomic_files, json_text


def refuse(token):
  raise AssertionError(f"{token} is no JSON")


def strict_loads(text):
  return json.loads(text, parse_constant=refuse)


VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
  max_leaves=12,
)


def expected(value):
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, dict):
    return {key: expected(item) for key, item in value.items()}
  return [expected(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=200, deadline=None, derandomize=True)
@given(VALUES)
def test_any_value_becomes_json_that_a_strict_reader_reads_back(value):
  assert strict_loads(json_text.dumps(value)) == expected(value)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_a_number_that_is_not_finite_is_null(number):
  assert json_text.dumps({"score": number, "rows": (1.5, [number])}) == (
    '{"score": null, "rows": [1.5, [null]]}'
  )


def test_options_of_json_hold_with_and_without_such_numbers():
  assert json_text.dumps({"é": 1.0}, ensure_ascii=False) == '{"é": 1.0}'
  assert json_text.dumps({"é": math.nan}, ensure_ascii=False) == '{"é": null}'


def test_a_value_that_json_cannot_represent_is_an_error():
  with pytest.raises(TypeError):
    json_text.dumps({"a": object(), "b": math.nan})


def test_result_files_hold_null(tmp_path):
  path = tmp_path / "result.json"
  atomic_files.write_json(path, {"metrics": {"accuracy": math.nan, "loss": 1.0}})
  assert strict_loads(path.read_text()) == {"metrics": {"accuracy": None, "loss": 1.0}}
