"""Predictions for every record of a split, and the sheet of the first ones."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np

from mplug_jax.data import pipeline
from mplug_jax.data.errors import ImageError
from mplug_jax.data.images import ops, video
from mplug_jax.reporting import sample_sheet

SHEET_IMAGES = 12
SHEET_PIXELS = 288
SHEET_FRAMES = 4
SAMPLES = 5

# {name: predict function of training.build.Build, with its parameters}
Predict: TypeAlias = dict[str, Callable[..., Any]]

_Item = TypeVar("_Item")


def rows(
  config: Any,
  source: Any,
  transform: Callable[..., dict[str, Any]],
  fn: Callable[..., Any],
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[tuple[int, dict[str, Any], bool]]:
  """Runs a predict function over every record of a source, in order.

  Every process must exhaust the generator.

  Args:
    config: config of the run; reads eval.batch_size, eval.limit (0 for all records) and
      loader.threads.
    source: records, see data/pipeline.py.
    transform: function of records, see data/pipeline.py.
    fn: function from a batch of this process to {name: array with the rows of all processes},
      which include "index", "mask" and "corrupt" of the batch.
    process_index: number of this process.
    process_count: number of processes.

  Yields:
    (record number, {name: row of that record}, True if one of its images is unreadable).
  """
  batches = pipeline.eval_batches(
    source,
    transform,
    batch_size=config.eval.batch_size,
    process_index=process_index,
    process_count=process_count,
    limit=config.eval.limit or None,
    threads=config.loader.threads,
  )
  try:
    for batch in batches:
      out = fn(batch)
      for row in np.flatnonzero(out["mask"]):
        yield (
          int(out["index"][row]),
          {name: x[row] for name, x in out.items()},
          bool(out["corrupt"][row]),
        )
  finally:
    batches.close()


def spread(items: list[_Item], count: int = SAMPLES) -> list[_Item]:
  """Returns at most `count` items of a list, evenly spaced.

  Args:
    items: any items.
    count: largest number of items.
  """
  return items[:: max(1, len(items) // count)][:count]


def unscored_note(scored: int, total: int, entries: str, truth: str) -> list[str]:
  """Returns a sentence if only some entries are scored, else nothing.

  Args:
    scored: number of scored entries.
    total: number of entries.
    entries: their name, in the plural.
    truth: name of the truth that the others lack.
  """
  if scored in (0, total):
    return []
  return [f"{total - scored} of {total} {entries} have no {truth} and are not scored."]


def write_sheet(
  path: str,
  entries: Iterable[tuple[Any, Sequence[sample_sheet.Sample]]],
  size: int,
  frames: int = 0,
) -> None:
  """Draws up to SHEET_IMAGES images with texts below; writes nothing without readable images.

  Args:
    path: file to write.
    entries: (image as data.images.ops.decode_image reads it, its samples).
    size: pixels of the model's images; larger images are drawn larger.
    frames: frames of a clip, of which up to SHEET_FRAMES are drawn; 0 for images.
  """
  images = []
  lines = []
  for image, samples in entries:
    if len(images) == SHEET_IMAGES:
      break
    try:
      images.append(
        video.contact_image(image, min(frames, SHEET_FRAMES)) if frames else ops.decode_image(image)
      )
    except ImageError:
      continue
    lines.append(samples)
  if images:
    size = max(size, min(max(max(image.shape) for image in images), SHEET_PIXELS))
    sample_sheet.sample_sheet([ops.eval_transform(image, size) for image in images], lines, path)
