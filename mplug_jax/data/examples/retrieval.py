"""Images with captions -> examples for retrieval: an image, a caption, the number of the image.

The sources are those of captioning (see caption.images), and "coco", "flickr30k" and "files": the
official files of retrieval and pre-training, JSON lists of {"image", "caption", "image_id"} with
one caption in training and a list of captions in evaluation, with the keys of source "jsonl". Any
file may be a pattern of shards, see shards.py.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

from mplug_jax.config import Config
from mplug_jax.data.examples import caption as caption_lib
from mplug_jax.data.examples import record_view
from mplug_jax.data.images import reader
from mplug_jax.data.sources import caption
from mplug_jax.data.text import cleaning, token_rows
from mplug_jax.data.text.tokenizer_base import Tokenizer
from mplug_jax.data.types import Example, Record, Source


class Pairs:
  """Source of pairs: every caption with its image.

  A record is {"image", "image_id", "id": number of the image in `images`, "caption"}.

  Attributes:
    images: source of images, see caption.py.
  """

  def __init__(self, images: Any):
    """Counts the captions.

    Args:
      images: source of images.
    """
    self.images = images
    counts = images.counts()
    self._image = np.repeat(np.arange(len(images)), counts)
    self._caption = np.arange(len(self._image)) - np.repeat(np.cumsum(counts) - counts, counts)

  def __len__(self) -> int:
    return len(self._image)

  def __getitem__(self, index: int) -> Record:
    number = int(self._image[index])
    record = self.images[number]
    return {
      "image": record["image"],
      "image_id": record["image_id"],
      "id": number,
      "caption": record["captions"][self._caption[index]],
    }


def get_images(data: Config, split: str) -> Any:
  """Returns the images of a split, each once with all its captions; see caption.images.

  Args:
    data: config.data.
    split: "train", "val" or "test".

  Raises:
    ValueError: as caption.images, or an image has no captions.
    FileNotFoundError: as caption.images.
  """
  # Entries of the official files have the keys of lines of "jsonl".
  source = caption.images(
    {**data, "name": "jsonl"} if data.name in ("coco", "flickr30k", "files") else data, split
  )
  if not source.counts().all():
    number = int(np.argmin(source.counts()))
    raise ValueError(
      f"Image {source[number]['image_id']!r} of split {split!r} has no captions, and retrieval "
      f"needs at least one of each image."
    )
  return source


def get_source(data: Config, split: str) -> Source:
  """Returns the pairs of a split; an epoch shows every caption once.

  Args:
    data: config.data.
    split: "train", "val" or "test".

  Raises:
    ValueError: as `get_images`.
    FileNotFoundError: as `get_images`.
  """
  return Pairs(get_images(data, split))


def texts(source: Any, records: int = 0) -> Iterator[str]:
  """Returns captions.

  Args:
    source: a `Pairs`.
    records: number of images, evenly spaced; 0 = all.
  """
  return caption_lib.texts(source.images, records)


class CaptionRows:
  """Function from a caption to i32[L], [bos] pieces, padded with the pad id.

  Captions are cleaned and cut to max_words words and L tokens (docs/official.md items 31 and 50).
  Rows are shared: copy before writing.
  """

  def __init__(self, tokenizer: Tokenizer, max_words: int, length: int):
    """Makes the function.

    Args:
      tokenizer: tokenizer of the run.
      max_words: words of a caption.
      length: L, tokens of a caption.
    """
    self._max_words = max_words
    self._rows = token_rows.TokenRows(tokenizer, length)

  def __call__(self, text: str) -> Int[np.ndarray, " tokens"]:
    """Returns the token ids of a caption."""
    return self._rows(cleaning.pre_caption(text, self._max_words))


def caption_rows(config: Config, tokenizer: Tokenizer) -> CaptionRows:
  """Returns the CaptionRows that config.data describes.

  Args:
    config: config of the run.
    tokenizer: tokenizer of the run.
  """
  return CaptionRows(tokenizer, config.data.max_words, config.data.max_caption)


class PairTransform:
  """Transform for `pipeline`: called with (index, record, rng), it returns an example.

  The keys of an example are image u8[S, S, 3], not normalized; corrupt bool[], True for an
  unreadable image, which is black; index i32[]; with `rows` also caption i32[L] and id i32[], equal
  for the captions of an image. Without `rows`, records may be those of `get_images`.

  A call raises ImageError for an unreadable image, if `images` is strict.
  """

  def __init__(self, images: reader.ImageReader, rows: CaptionRows | None = None):
    """Makes the transform.

    Args:
      images: reads the images.
      rows: converts captions; None: examples have no captions.
    """
    self._images = images
    self._rows = rows

  def __call__(self, index: int, record: Record, rng: np.random.Generator | None) -> Example:
    """Makes an example; `rng` is None in evaluation."""
    image, corrupt = self._images(record["image"], record["image_id"], rng)
    example = {"image": image, "corrupt": np.bool_(corrupt), "index": np.int32(index)}
    if self._rows is not None:
      example |= {"caption": self._rows(record["caption"]), "id": np.int32(record["id"])}
    return example


def make_transform(config: Config, tokenizer: Tokenizer, train: bool) -> PairTransform:
  """Returns the transform that config.data and config.model describe.

  Args:
    config: config of the run.
    tokenizer: tokenizer of the run.
    train: the records are pairs; otherwise images.
  """
  return PairTransform(reader.reader(config), caption_rows(config, tokenizer) if train else None)


def _item(record: Record, data: Config) -> record_view.Item:
  captions = record["captions"]
  return record_view.Item(
    images=[record["image"]],
    ids=[record["image_id"]],
    texts=[record_view.cleaned("caption", text, data.max_words) for text in captions],
    shown=[("", text) for text in captions],
  )


VIEW = record_view.View(
  source=get_images,
  item=_item,
  entries="images",
  limits={"caption": record_view.Limit("max_caption", ends=False)},
)
