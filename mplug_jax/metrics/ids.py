"""Ids of questions and images as results files write them."""

import re

import numpy as np


def canonical(value: object) -> int | str:
  """Returns an id as results files have it; ids with equal values cannot be told apart there.

  Args:
    value: a number or text: 7, "7", 7.0 and np.int64(7) are the integer 7. "007" stays text, since
      as 7 it could collide with another id.
  """
  if isinstance(value, (int, np.integer)):
    return int(value)
  if isinstance(value, (float, np.floating)) and float(value).is_integer():
    return int(value)
  text = str(value)
  # Python refuses to convert thousands of digits.
  return int(text) if re.fullmatch(r"0|-?[1-9][0-9]{0,99}", text) else text
