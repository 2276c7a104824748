"""Captioning records -> examples of fixed shape: an image and C of its captions.

A record is

    {"image": path | encoded bytes | u8[H, W, 3], "image_id": int | str, "captions": [str, ...]}

with "domain" where the benchmark has one (NoCaps). A source of images has `len(source)`,
`source[i]` and, without pixels, `captions(i)`, `counts()` and `group(i)`: the name of the part of
the split, scored separately, that the image belongs to; None if there are no parts. Captions of
files are lower-cased and otherwise unchanged. Messages count the entries of files from 1.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mplug_jax.config import Config
from mplug_jax.data.examples import record_view
from mplug_jax.data.images import reader
from mplug_jax.data.sources.caption import images
from mplug_jax.data.sources.chunked import Chunked
from mplug_jax.data.text import token_rows
from mplug_jax.data.text.tokenizer_base import Tokenizer
from mplug_jax.data.types import Example, Record, Source

PROMPT_MODES = ("standard", "official")


def get_source(data: Config, split: str) -> Source:
  """Returns the images of an evaluated split; of "train", chunks of their captions.

  A chunk has data.captions_per_image captions.

  Args:
    data: config.data.
    split: "train", "val" or "test".

  Raises:
    ValueError: data.captions_per_image is below 1, or as `images`.
    FileNotFoundError: as `images`.
  """
  source = images(data, split)
  if split != "train":
    return source
  if data["captions_per_image"] < 1:
    raise ValueError(f"data.captions_per_image={data['captions_per_image']} must be at least 1.")
  return Chunked(source, data["captions_per_image"], "captions", source.counts())


def texts(source: Any, records: int = 0) -> Iterator[str]:
  """Yields captions.

  Args:
    source: training records, with a method `captions`.
    records: number of records, evenly spaced; 0 = all.
  """
  for index in range(0, len(source), max(1, len(source) // records) if records else 1):
    yield from source.captions(index)


# ---- examples


class Prompt(NamedTuple):
  """The beginning of all captions.

  Attributes:
    text: put before each caption.
    ids: its tokens from [bos] on, which are no targets.
    start: tokens that generation begins with.
    decoded: the text of `ids`, which is removed from generated captions.
  """

  text: str
  ids: tuple[int, ...]
  start: tuple[int, ...]
  decoded: str


def prompt(config: Config, tokenizer: Tokenizer) -> Prompt:
  """Returns the prompt that config.task.prompt and config.task.prompt_mode describe.

  "official" glues prompt and caption together without a space and leaves the prompt's last word to
  the model (docs/official.md item 32); "standard" does neither.

  Args:
    config: config of the run.
    tokenizer: tokenizer of the run.

  Raises:
    ValueError: the mode is unknown, or config.data.max_caption leaves no room for a caption.
  """
  text = config.task.prompt
  mode = config.task.prompt_mode
  if mode not in PROMPT_MODES:
    raise ValueError(f"config.task.prompt_mode={mode!r} is not one of {', '.join(PROMPT_MODES)}.")
  ids = tuple(i for i in tokenizer.encode(text) if i != tokenizer.eos_id)
  if len(ids) + 2 > config.data.max_caption:
    raise ValueError(
      f"config.data.max_caption={config.data.max_caption} leaves no room for a caption: [CLS] and "
      f"config.task.prompt take {len(ids)} tokens, [SEP] one."
    )
  official = mode == "official"
  start = ids[:-1] if official and len(ids) > 1 else ids
  return Prompt(
    text if official or not text else f"{text.rstrip()} ", ids, start, tokenizer.decode(ids)
  )


class CaptionTransform:
  """Transform for `pipeline`: called with (index, record, rng), it returns an example.

  The keys of an example are image u8[H, W, 3], not normalized; caption i32[C, T], [bos] prompt
  caption [eos], padded with the pad id, all pads in unused rows; caption_valid bool[C]; corrupt
  bool[]; index i32[]. A caption that is too long loses its last tokens, never its [eos]. An
  unreadable image is black, corrupt and has no captions.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    images: reader.ImageReader,
    prompt: Prompt,
    *,
    captions_per_image: int,
    max_caption: int,
  ):
    """Makes the transform.

    Args:
      tokenizer: tokenizer of the run.
      images: reads the images.
      prompt: beginning of all captions.
      captions_per_image: C; further captions are dropped, which happens only in evaluation (see
        Chunked).
      max_caption: T, tokens.
    """
    self._images = images
    self._prompt = prompt
    self._count = captions_per_image
    self._pad_id = tokenizer.pad_id
    self._rows = token_rows.TokenRows(tokenizer, max_caption, ends=True)

  def __call__(self, index: int, record: Record, rng: np.random.Generator | None) -> Example:
    """Makes an example; `rng` is None in evaluation."""
    image, corrupt = self._images(record["image"], record["image_id"], rng)
    captions = np.full((self._count, self._rows.length), self._pad_id, np.int32)
    valid = np.zeros(self._count, np.bool_)
    for slot, text in enumerate([] if corrupt else record["captions"][: self._count]):
      captions[slot] = self._rows(self._prompt.text + text)
      valid[slot] = True
    return {
      "image": image,
      "caption": captions,
      "caption_valid": valid,
      "corrupt": np.bool_(corrupt),
      "index": np.int32(index),
    }


def make_transform(config: Config, tokenizer: Tokenizer, train: bool) -> CaptionTransform:
  """Returns the transform that config.data, config.task and config.model describe.

  Args:
    config: config of the run.
    tokenizer: tokenizer of the run.
    train: unused; an example is augmented if the pipeline passes a generator.

  Raises:
    ValueError: as `prompt`.
  """
  del train
  return CaptionTransform(
    tokenizer,
    reader.reader(config),
    prompt(config, tokenizer),
    captions_per_image=config.data.captions_per_image,
    max_caption=config.data.max_caption,
  )


def _item(record: Record, data: Config) -> record_view.Item:
  del data
  return record_view.Item(
    images=[record["image"]],
    ids=[record["image_id"]],
    texts=[record_view.Text("caption", text, text) for text in record["captions"]],
    shown=[("", text) for text in record["captions"]],
  )


def _prefix(config: Config, tokenizer: Tokenizer) -> str:
  return prompt(config, tokenizer).text


VIEW = record_view.View(
  source=images,
  item=_item,
  entries="images",
  limits={"caption": record_view.Limit("max_caption", ends=True)},
  prefix=_prefix,
)
