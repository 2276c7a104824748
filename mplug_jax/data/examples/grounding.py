"""Referring expressions -> examples of fixed shape: image on a square canvas, phrases, boxes."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mplug_jax.config import Config
from mplug_jax.data import boxes
from mplug_jax.data.errors import BadRecords, RecordError
from mplug_jax.data.examples import record_view
from mplug_jax.data.images import box_transforms, reader
from mplug_jax.data.sources import grounding
from mplug_jax.data.text import token_rows
from mplug_jax.data.text.tokenizer_base import Tokenizer
from mplug_jax.data.types import Example, Record, Source


def get_source(data: Config, split: str) -> Source:
  """Returns the records of one split, see sources/grounding.py.

  Args:
    data: config.data.
    split: "train", "val" or "test".
  """
  return grounding.get(data, split)


def texts(source: Any, records: int = 0) -> Iterator[str]:
  """Yields referring expressions.

  Args:
    source: training records, with a method `expressions`.
    records: number of records, evenly spaced; 0 = all.
  """
  for index in range(0, len(source), max(1, len(source) // records) if records else 1):
    for expression in source.expressions(index):
      yield expression["text"].lower()


class WholeImages(reader.ImageReader):
  """ImageReader that returns images in their original size."""

  def _transform(self, image, rng):
    return image


class GroundingTransform:
  """Transform for `pipeline`: called with (index, record, rng), it returns an example.

  The keys of an example are image u8[S, S, 3], not normalized, black outside `placed`; placed
  i32[4], (left, top, right, bottom) of the image on the canvas; size i32[2], width and height of
  the original image, for `in_image_pixels`; phrase i32[E, L], [bos] pieces [eos] pad...; box
  f32[E, 4], center x, center y, width and height as shares of the canvas; valid bool[E], True if
  the box is known; corrupt bool[]; index i32[].

  Training picks E of the record's expressions at random without replacement. A record with fewer
  leaves the rest invalid. An unreadable image gives zeros, corrupt and nothing valid; in evaluation
  it keeps the phrases, because results need a box for every phrase. An expression whose box lies
  outside its image is not valid; it is counted and named in the log.

  A call raises ValueError in evaluation for more expressions than E (use `chunked.Chunked`);
  ImageError for an unreadable image, if `images` is strict; RecordError for a box outside its
  image, if `strict`.

  Attributes:
    bad: count of the boxes outside their image, each time they were met.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    images: WholeImages,
    *,
    size: int,
    expressions_per_image: int,
    max_phrase: int,
    train: bool,
    augment: Mapping[str, Any],
    blank: bool = False,
    strict: bool = False,
  ):
    """Makes the transform.

    Args:
      tokenizer: tokenizer of the run.
      images: reads the images.
      size: S, pixels.
      expressions_per_image: E.
      max_phrase: L, tokens with [bos] and [eos]; the rest is cut.
      train: draws expressions, and augments.
      augment: options of `box_transforms.augment`.
      blank: images are black, to measure how much the texts alone reveal.
      strict: raises RecordError for a box outside its image.
    """
    effect = "It has no weight." if train else "Its expression is located, but does not count."
    self.bad = BadRecords(strict, effect)
    self._rows = token_rows.TokenRows(tokenizer, max_phrase, ends=True)
    self._images = images
    self._size = size
    self._count = expressions_per_image
    self._pad_id = tokenizer.pad_id
    self._train = train
    self._augment = dict(augment)
    self._blank = blank

  def __call__(self, index: int, record: Record, rng: np.random.Generator | None) -> Example:
    """Makes an example; `rng` is None in evaluation."""
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
      texts = self._fill(example, image, record["image_id"], expressions, texts, rng)
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
        f"source in Chunked, so that none is left out."
      )
    return [expressions[i] for i in rng.choice(len(expressions), self._count, replace=False)]

  def _fill(self, example, image, name, expressions, texts, rng):
    """Writes image and boxes; returns the texts, changed where the image was mirrored."""
    height, width = image.shape[:2]
    inside = [self._inside(expression, name, width, height) for expression in expressions]
    known = np.array([box is not None for box in inside], bool)
    corners = np.array([box for box in inside if box is not None], np.float64).reshape(-1, 4)
    if self._train:
      canvas, texts = box_transforms.augment(
        image, corners, texts, self._size, rng, **self._augment
      )
    else:
      canvas = box_transforms.fit(image, corners, self._size)
    if not self._blank:
      example["image"] = canvas.image
    example["placed"][:] = canvas.placed
    example["size"][:] = (width, height)
    slots = np.flatnonzero(known)
    example["box"][slots] = boxes.to_centered(canvas.boxes) / self._size
    example["valid"][slots] = True
    return texts

  def _inside(self, expression, name, width, height):
    """Returns the part of an expression's box inside its image, None without one."""
    box = expression["box"]
    if box is None:
      return None
    inside = boxes.inside(box, width, height)
    if inside is None:
      numbers = ", ".join(f"{x:g}" for x in box)
      location = "".join(f"{part}, " for part in expression.get("location", ()))
      number = f"{'id' if location else 'Id'} {expression['id']}: " if "id" in expression else ""
      self.bad.add(
        RecordError(
          f"{location}{number}the box ({numbers}) of {expression['text']!r} lies outside its image "
          f"of {width} x {height} pixels, {name}."
        )
      )
    return inside


def make_transform(config: Config, tokenizer: Tokenizer, train: bool) -> GroundingTransform:
  """Returns the transform that config.data and config.model describe.

  Args:
    config: config of the run.
    tokenizer: tokenizer of the run.
    train: draws expressions, and augments.

  Raises:
    ValueError: data.augment.long_sides is out of range.
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
    strict=data.strict,
  )


def _item(record: Record, data: Config) -> record_view.Item:
  del data
  phrases = record["expressions"]
  return record_view.Item(
    images=[record["image"]],
    ids=[phrase["id"] for phrase in phrases if "id" in phrase],
    texts=[record_view.Text("phrase", p["text"], p["text"].lower()) for p in phrases],
    shown=[("", phrase["text"]) for phrase in phrases[:1]],
    boxes=tuple((p["text"], p["box"]) for p in phrases if p["box"] is not None),
  )


VIEW = record_view.View(
  source=get_source,
  item=_item,
  entries="phrases",
  limits={"phrase": record_view.Limit("max_phrase", ends=True)},
)
