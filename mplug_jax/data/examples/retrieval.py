"""Images with captions -> examples for retrieval: an image, one of its captions and the number of the image.

The sources are those of captioning (see caption.images), and "coco", "flickr30k" and "files": the
official files of retrieval and pre-training, json lists of {"image", "caption", "image_id"} with
one caption in training and the list of them in evaluation, and with the keys of source "jsonl". Any
file may be a pattern of shards, see shards.py.
"""

import numpy as np

from mplug_jax.data.examples import caption as caption_lib
from mplug_jax.data.images import reader
from mplug_jax.data.sources import caption
from mplug_jax.data.text import cleaning, token_rows


class Pairs:
  """Every caption with its image, as records {"image", "image_id", "id": number of the image in `images`, "caption"}.

  `images`: a source of images, see caption.py.
  """

  def __init__(self, images):
    self.images, counts = images, images.counts()
    self._image = np.repeat(np.arange(len(images)), counts)
    self._caption = np.arange(len(self._image)) - np.repeat(np.cumsum(counts) - counts, counts)

  def __len__(self):
    return len(self._image)

  def __getitem__(self, index):
    number = int(self._image[index])
    record = self.images[number]
    return {
      "image": record["image"],
      "image_id": record["image_id"],
      "id": number,
      "caption": record["captions"][self._caption[index]],
    }


def get_images(data, split):
  """The images of a split, each once, with all their captions: see caption.images.

  Raises:
    ValueError, FileNotFoundError: as caption.images; an image without captions.
  """
  # What is in a line of one's own file is an entry of the official ones.
  source = caption.images(
    {**data, "name": "jsonl"} if data.name in ("coco", "flickr30k", "files") else data, split
  )
  if not source.counts().all():
    number = int(np.argmin(source.counts()))
    raise ValueError(
      f"Image {source[number]['image_id']!r} of split {split!r} has no captions, and retrieval "
      f"needs at least one of each."
    )
  return source


def get_source(data, split):
  """The pairs of a split, an epoch of which shows every caption once; errors as of `get_images`."""
  return Pairs(get_images(data, split))


def texts(source, records=0):
  """The captions of `records` images of a `Pairs`, evenly spaced; 0: of all."""
  return caption_lib.texts(source.images, records)


class CaptionRows:
  """Caption -> i32[L], [bos] pieces, padded with the pad id: cleaned, cut to max_words words and L tokens (docs/official.md items 31
  and 50). Rows are shared: copy before writing.
  """

  def __init__(self, tokenizer, max_words, length):
    self._max_words, self._rows = max_words, token_rows.TokenRows(tokenizer, length)

  def __call__(self, text):
    return self._rows(cleaning.pre_caption(text, self._max_words))


def caption_rows(config, tokenizer):
  """The CaptionRows that config.data describes."""
  return CaptionRows(tokenizer, config.data.max_words, config.data.max_caption)


class PairTransform:
  """A transform for `pipeline`: called with (index, record, rng), returns an example.

  Its keys: image u8[S, S, 3], not normalised; corrupt bool[], the image could not be read and is
    black; index i32[]; with `rows`
  also caption i32[L] and id i32[], equal for the captions of an image. Without, records may be
  those of `get_images`.

  Raises (when called):
    ImageError: a strict ImageReader met an image that cannot be read.
  """

  def __init__(self, images, rows=None):
    """images: an ImageReader. rows: CaptionRows, or None."""
    self._images, self._rows = images, rows

  def __call__(self, index, record, rng):
    image, corrupt = self._images(record["image"], record["image_id"], rng)
    example = {"image": image, "corrupt": np.bool_(corrupt), "index": np.int32(index)}
    if self._rows is not None:
      example |= {"caption": self._rows(record["caption"]), "id": np.int32(record["id"])}
    return example


def make_transform(config, tokenizer, train):
  """The transform that config.data and config.model describe: of pairs for training, of images for evaluation."""
  return PairTransform(reader.reader(config), caption_rows(config, tokenizer) if train else None)
