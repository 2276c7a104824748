"""What the evaluators share: predictions for every record of a split, in order, and the picture of the first ones."""

import numpy as np

from mplug_jax.data import pipeline
from mplug_jax.data.errors import ImageError
from mplug_jax.data.images import ops, video
from mplug_jax.reporting import sample_sheet

SHEET_IMAGES, SHEET_PIXELS, SHEET_FRAMES, SAMPLES = 12, 288, 4, 5


def rows(config, source, transform, fn, process_index=0, process_count=1):
  """Runs a predict function over a source, every record once and in order; every process must exhaust the generator.

  Args:
    config: eval.batch_size, eval.limit (0: all records) and loader.threads are read.
    source, transform: see data/pipeline.py.
    fn: function batch of this process -> {name: array of all processes' rows}, with `index`, `mask` and `corrupt` among the names.

  Yields:
    (record number, {name: that row}, whether an image of the record could not be read).
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


def spread(items, count=SAMPLES):
  """At most `count` items of a list, evenly spaced."""
  return items[:: max(1, len(items) // count)][:count]


def write_sheet(path, entries, size, frames=0):
  """Draws images with texts beneath, at most SHEET_IMAGES of them; nothing when no image can be read.

  Args:
    entries: iterable of (image as `image_ops.decode_image` takes it, [plots.Sample, ...]).
    size: of the model's images, pixels; larger images are shown larger. frames: of clips, some of which are shown; 0: images.
  """
  images, lines = [], []
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
    sample_sheet.sample_sheet(
      np.stack([ops.eval_transform(image, size) for image in images]), lines, path
    )
