"""Input rows of the predict command. No JAX."""

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

from mplug_jax.data.images.suffixes import IMAGE_SUFFIXES
from mplug_jax.data.storage import annotations


def of_folder(folder: str) -> Iterator[dict[str, str]]:
  """Yields {"image": path} for all images under a folder, sorted by name.

  Raises:
    FileNotFoundError: the folder has no images.
  """
  empty = True
  for parent, folders, names in os.walk(folder):
    folders.sort()
    for name in sorted(names):
      if name.lower().endswith(IMAGE_SUFFIXES):
        empty = False
        yield {"image": os.path.join(parent, name)}
  if empty:
    raise FileNotFoundError(f"{folder} has no images ({', '.join(IMAGE_SUFFIXES)}).")


def of_file(path: str, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
  """Yields the objects of a JSONL file.

  Args:
    path: file with one JSON object a line.
    keys: keys that every object must have.

  Raises:
    ValueError: a line is not an object or lacks a key; the message gives file and line.
  """
  for row, location in annotations.lines(path):
    if not isinstance(row, dict):
      raise ValueError(f"{location} is not a JSON object.")
    if missing := [key for key in keys if key not in row]:
      raise ValueError(
        f"{location} has no {' and no '.join(missing)}; it has {', '.join(row) or 'nothing'}."
      )
    yield _finite(row)


def _finite(value: Any) -> Any:
  """Returns a JSON value with null for NaN and infinities, which are no JSON."""
  if isinstance(value, dict):
    return {key: _finite(x) for key, x in value.items()}
  if isinstance(value, list):
    return [_finite(x) for x in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
