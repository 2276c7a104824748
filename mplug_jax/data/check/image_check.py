"""Opens the images of records and compares boxes with their sizes."""

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mplug_jax.config import Config
from mplug_jax.data.boxes import inside
from mplug_jax.data.check import box_units, image_values
from mplug_jax.data.check.report import Report
from mplug_jax.data.errors import ImageError
from mplug_jax.data.examples.record_view import Item
from mplug_jax.data.images import ops, video
from mplug_jax.data.storage import archives

_CHUNK = 1024  # images handed to the threads together


def is_path(image: Any) -> bool:
  """Returns whether an image is given by its path.

  Args:
    image: as decode_image takes it.
  """
  return isinstance(image, str | os.PathLike)


def open_images(report: Report, items: Sequence[Item], data: Config, threads: int) -> set[Any]:
  """Opens every image file and every encoded image.

  Args:
    report: receives the counts, unreadable images and wrong boxes.
    items: contents of the records.
    data: config.data.
    threads: number of threads.

  Returns:
    The unreadable images.
  """
  boxes: dict[Any, list[Any]] = {}
  names: dict[Any, Any] = {}
  for item in items:
    for image in item.images:
      if isinstance(image, np.ndarray):
        report.images += 1  # made by the source itself
        continue
      boxes.setdefault(image, []).extend(item.boxes)
      names[image] = image if is_path(image) else f"of record {item.ids[0]}"
  report.images += len(boxes)
  unreadable = set()
  images = iter(boxes)
  with ThreadPoolExecutor(threads) as pool:
    while chunk := list(itertools.islice(images, _CHUNK)):
      results = pool.map(lambda image: _open(image, names[image], data), chunk)
      for image, (size, problem, (kind, largest)) in zip(chunk, results, strict=True):
        if size:
          _check_boxes(report, image, names[image], boxes[image], *size)
          if kind:
            report.values.setdefault(kind, []).append((str(names[image]), largest))
          continue
        unreadable.add(image)
        if problem:
          report.corrupt.append(problem)
        else:
          report.missing.append(image)
  return unreadable


def _open(
  image: Any, name: Any, data: Config
) -> tuple[tuple[int, int] | None, str, tuple[str, int]]:
  """Opens an image.

  Returns:
    ((height, width), "", kind and largest value of image_values), or (None, problem, ("", 0)); the
    problem is "" for a missing file.
  """
  values = "", 0
  try:
    if is_path(image) and not archives.is_file(image):
      return None, "", values
    if data.frames:
      pixels = video.read_clip(image, data.frames, data.frame_sampling, name)[0]
    else:
      pixels = ops.decode_image(image, name)
      values = image_values.kind(image, pixels)  # a clip may begin with a black frame
  except (ImageError, OSError) as error:
    return None, str(error), values
  except ValueError as error:  # raised by the archive
    return None, f"Image {name} cannot be read: {error}", values
  height, width = pixels.shape[:2]
  return (height, width), "", values


def _check_boxes(
  report: Report, image: Any, name: Any, boxes: list[Any], height: int, width: int
) -> None:
  report.boxes += len(boxes)
  beyond = any(box_units.reaches_beyond(corners, width, height) for _, corners in boxes)
  turned = beyond and image_values.is_turned(image)
  for phrase, corners in boxes:
    placed = box_units.PlacedBox(str(name), phrase, tuple(corners), width, height, turned)
    report.placed.append(placed)
    x1, y1, x2, y2 = corners
    if inside(corners, width, height) is None:
      report.outside.append(
        f"{name}: {(x1, y1, x2, y2)} of {phrase!r} in {width} x {height} pixels"
      )
    elif x1 < 0 or y1 < 0 or x2 > width or y2 > height:
      report.cut += 1
