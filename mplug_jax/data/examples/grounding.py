"""Referring expressions -> examples of fixed shape: an image on a square canvas, E phrases and their boxes."""

import numpy as np

from mplug_jax.data import boxes
from mplug_jax.data.images import box_transforms, reader
from mplug_jax.data.sources import grounding
from mplug_jax.data.text import token_rows


def get_source(data, split):
  """See `grounding_sources.get`."""
  return grounding.get(data, split)


def texts(source, records=0):
  """The expressions that a tokenizer is fitted to.

  Records: read this many, evenly spaced; 0: all.
  """
  for index in range(0, len(source), max(1, len(source) // records) if records else 1):
    for expression in source.expressions(index):
      yield expression["text"].lower()


class WholeImages(reader.ImageReader):
  """Images of any size as they are; an image that cannot be read is black, as of an ImageReader."""

  def _transform(self, image, rng):
    return image


class GroundingTransform:
  """A transform for `pipeline`: called with (index, record, rng), returns an example.

  Its keys: image u8[S, S, 3], not normalised, black outside `placed` i32[4] = (left, top, right,
    bottom) of the image on the
  canvas; size i32[2], width and height of the image before, for `in_image_pixels`; phrase i32[E,
  L], [bos] pieces [eos] pad...; box f32[E, 4], centre x, centre y, width and height as shares of
  the canvas; valid bool[E], whether the box is known; corrupt bool[]; index i32[].

  Training picks E of the record's expressions at random without replacement. A record with fewer
  leaves the rest invalid. An image that cannot be read gives zeros, corrupt and nothing valid; in
  evaluation the phrases are there, because results need a box for every phrase.

  Args:
    tokenizer: as in `mplug_jax.data.text.tokenizer`.
    images: a WholeImages.
    size: S, pixels.
    expressions_per_image: E.
    max_phrase: L, tokens with [bos] and [eos]; the rest is cut.
    train: draw expressions, and augment.
    augment: options of `box_transforms.augment`.
    blank: images are black, to measure what the texts alone give away.

  Raises (when called):
    ValueError: a box that lies outside its image, or, in evaluation, more expressions than E (use
      `chunked.Chunked`).
    ImageError: a strict WholeImages met an image that cannot be read.
  """

  def __init__(
    self, tokenizer, images, *, size, expressions_per_image, max_phrase, train, augment, blank=False
  ):
    self._rows = token_rows.TokenRows(tokenizer, max_phrase, ends=True)
    self._images, self._size, self._count = images, size, expressions_per_image
    self._pad_id, self._train, self._augment, self._blank = (
      tokenizer.pad_id,
      train,
      dict(augment),
      blank,
    )

  def __call__(self, index, record, rng):
    count = self._count
    expressions = self._pick(record["expressions"], rng)
    texts = [expression["text"].lower() for expression in expressions]
    image, corrupt = self._images(record["image"], record["image_id"])
    example = {
      "image": np.zeros((self._size, self._size, 3), np.uint8),
      "placed": np.zeros(4, np.int32),
      "size": np.zeros(2, np.int32),
      "phrase": np.full((count, self._rows.length), self._pad_id, np.int32),
      "box": np.zeros((count, 4), np.float32),
      "valid": np.zeros(count, np.bool_),
      "corrupt": np.bool_(corrupt),
      "index": np.int32(index),
    }
    if not corrupt:
      texts = self._fill(example, image, expressions, texts, rng)
    if not (corrupt and self._train):
      for slot, text in enumerate(texts):
        example["phrase"][slot] = self._rows(text)
    return example

  def _pick(self, expressions, rng):
    if len(expressions) <= self._count:
      return expressions
    if not self._train:
      raise ValueError(
        f"it has {len(expressions)} expressions, more than the {self._count} of a row; wrap the "
        f"source in "
        "Chunked, so that none is left out."
      )
    return [expressions[i] for i in rng.choice(len(expressions), self._count, replace=False)]

  def _fill(self, example, image, expressions, texts, rng):
    """Writes image and boxes; returns the texts, changed where the image was mirrored."""
    height, width = image.shape[:2]
    known = np.array([expression["box"] is not None for expression in expressions], bool)
    corners = [_inside(e, width, height) for e in expressions if e["box"] is not None]
    corners = np.array(corners, np.float64).reshape(-1, 4)
    if self._train:
      canvas, texts = box_transforms.augment(
        image, corners, texts, self._size, rng, **self._augment
      )
    else:
      canvas = box_transforms.fit(image, corners, self._size)
    if not self._blank:
      example["image"] = canvas.image
    example["placed"][:], example["size"][:] = canvas.placed, (width, height)
    slots = np.flatnonzero(known)
    example["box"][slots] = boxes.to_centred(canvas.boxes) / self._size
    example["valid"][slots] = True
    return texts


def _inside(expression, width, height):
  """The part of an expression's box that lies in the image. Raises ValueError if none does."""
  x1, y1, x2, y2 = expression["box"]
  clipped = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
  if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
    raise ValueError(
      f"the box {expression['box']} of {expression['text']!r} lies outside its image of {width} x "
      f"{height} pixels."
    )
  return clipped


def make_transform(config, tokenizer, train):
  """The transform that config.data and config.model describe.

  Raises ValueError for data.augment.long_sides out of range.
  """
  data = config.data
  if not data.augment.long_sides or not all(0 < share <= 1 for share in data.augment.long_sides):
    raise ValueError(
      f"config.data.augment.long_sides={data.augment.long_sides} must be shares of the canvas, "
      f"above 0 and at most 1."
    )
  return GroundingTransform(
    tokenizer,
    WholeImages(config.model.image_size, strict=data.strict),
    size=config.model.image_size,
    expressions_per_image=data.expressions_per_image,
    max_phrase=data.max_phrase,
    train=train,
    augment=data.augment.to_dict(),
    blank=data.black_images,
  )
