"""JSON text that every reader accepts: numbers that are not finite become null."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def without_nonfinite(value: Any) -> Any:
  """Returns a value with None for each number that is NaN or infinite.

  Args:
    value: a value that JSON can represent; NumPy floats in it are also replaced. It is not changed.
  """
  if isinstance(value, float | np.floating):
    return value if math.isfinite(value) else None
  if isinstance(value, Mapping):
    return {key: without_nonfinite(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [without_nonfinite(item) for item in value]
  return value


def dumps(value: Any, **options: Any) -> str:
  """Returns JSON text without the tokens NaN and Infinity, which JSON does not have.

  Args:
    value: a value that JSON can represent.
    **options: of json.dumps, except allow_nan.

  Raises:
    TypeError: JSON cannot represent the value.
  """
  try:
    return json.dumps(value, allow_nan=False, **options)
  except ValueError:  # a number is not finite
    return json.dumps(without_nonfinite(value), allow_nan=False, **options)
