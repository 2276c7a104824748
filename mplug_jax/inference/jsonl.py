"""Input rows of the predict command. No JAX."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from mplug_jax.data.errors import note
from mplug_jax.data.images.suffixes import IMAGE_SUFFIXES
from mplug_jax.data.storage import annotations, image_folder
from mplug_jax.runtime import json_text


def of_folder(folder: str) -> list[dict[str, str]]:
  """Returns {"image": path} for all images under a folder, in alphabetical order.

  The log says which files are skipped.

  Args:
    folder: the folder; its subfolders are searched too.

  Raises:
    FileNotFoundError: the folder has no images.
    OSError: a folder cannot be read.
  """
  suffixes = ", ".join(IMAGE_SUFFIXES)
  if not os.path.isdir(folder):
    raise FileNotFoundError(f"{folder} is no folder, so it has no images ({suffixes}).")
  files = image_folder.find_images(folder)
  if not files.paths:
    skipped = files.skipped()
    raise FileNotFoundError(f"{folder} has no images ({suffixes}). {skipped}".rstrip())
  if skipped := files.skipped():
    note(skipped)
  return [{"image": path} for path in files.paths]


def of_file(path: str, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
  """Yields the objects of a JSONL file, with null for numbers that are not finite.

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
    yield json_text.without_nonfinite(row)
