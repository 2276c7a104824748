"""Captioning records -> examples of fixed shape: an image and C of its captions.

A record is

    {"image": path | encoded bytes | u8[H, W, 3], "image_id": int | str, "captions": [str, ...]}

with "domain" where the benchmark has one (NoCaps). A source of images has `len(source)`,
`source[i]` and, without pixels, `captions(i)`, `counts()` and `group(i)`: which part of the split,
scored apart, the image belongs to; None if there are no parts. Captions of files are lower-cased
and otherwise left as they are. Entries of files are counted from 1 in messages.
"""

from typing import NamedTuple

import numpy as np

from mplug_jax.data.images import reader
from mplug_jax.data.sources.caption import images
from mplug_jax.data.sources.chunked import Chunked
from mplug_jax.data.text import token_rows

PROMPT_MODES = ("standard", "official")


def get_source(data, split):
  """`images` of an evaluated split.

  Of "train", every caption once in records of data.captions_per_image.
  """
  source = images(data, split)
  if split != "train":
    return source
  if data["captions_per_image"] < 1:
    raise ValueError(f"data.captions_per_image={data['captions_per_image']} must be at least 1.")
  return Chunked(source, data["captions_per_image"], "captions", source.counts())


def texts(source, records=0):
  """Captions, what a tokenizer is fitted to, of `records` records, evenly spaced; 0: all."""
  for index in range(0, len(source), max(1, len(source) // records) if records else 1):
    yield from source.captions(index)


# ---- examples


class Prompt(NamedTuple):
  """How captions begin.

  Text: put before each. ids: its tokens from [bos] on, which are no targets. start: what generation
  begins
  with. said: the text of `ids`, which is taken off generated captions.
  """

  text: str
  ids: tuple
  start: tuple
  said: str


def prompt(config, tokenizer):
  """config.task.prompt and .prompt_mode -> Prompt.

  "official" glues prompt and caption together without a space and leaves the prompt's last word to
  the model (docs/official.md item 32); "standard" does neither.

  Raises:
    ValueError: the mode is unknown, or captions have no room behind the prompt.
  """
  text, mode = config.task.prompt, config.task.prompt_mode
  if mode not in PROMPT_MODES:
    raise ValueError(f"config.task.prompt_mode={mode!r} is not one of {', '.join(PROMPT_MODES)}.")
  ids = tuple(i for i in tokenizer.encode(text) if i != tokenizer.eos_id)
  if len(ids) + 2 > config.data.max_caption:
    raise ValueError(
      f"config.data.max_caption={config.data.max_caption} leaves no room for a caption: [CLS] and "
      f"config.task.prompt take "
      f"{len(ids)} tokens, [SEP] one."
    )
  official = mode == "official"
  start = ids[:-1] if official and len(ids) > 1 else ids
  return Prompt(
    text if official or not text else f"{text.rstrip()} ", ids, start, tokenizer.decode(ids)
  )


class CaptionTransform:
  """A transform for `pipeline`: called with (index, record, rng), returns an example.

  Its keys: image u8[H, W, 3], not normalised; caption i32[C, T], [bos] prompt caption [eos], padded
    with the pad id, all pads where
  there is none; caption_valid bool[C]; corrupt bool[]; index i32[]. A caption that is too long
  loses its last tokens, never its [eos]. An image that cannot be read is black, corrupt and has no
  captions.

  Args:
    tokenizer: as in `mplug_jax.data.text.tokenizer`.
    images: an ImageReader.
    prompt: a Prompt.
    captions_per_image: C; captions beyond it are left out, which happens in evaluation alone (see
      Chunked).
    max_caption: T.
  """

  def __init__(self, tokenizer, images, prompt, *, captions_per_image, max_caption):
    self._images, self._prompt, self._count, self._pad_id = (
      images,
      prompt,
      captions_per_image,
      tokenizer.pad_id,
    )
    self._rows = token_rows.TokenRows(tokenizer, max_caption, ends=True)

  def __call__(self, index, record, rng):
    image, corrupt = self._images(record["image"], record["image_id"], rng)
    captions = np.full((self._count, self._rows.length), self._pad_id, np.int32)
    valid = np.zeros(self._count, np.bool_)
    for slot, text in enumerate([] if corrupt else record["captions"][: self._count]):
      captions[slot], valid[slot] = self._rows(self._prompt.text + text), True
    return {
      "image": image,
      "caption": captions,
      "caption_valid": valid,
      "corrupt": np.bool_(corrupt),
      "index": np.int32(index),
    }


def make_transform(config, tokenizer, train):
  """The transform that config.data, config.task and config.model describe.

  Errors as of `prompt`.
  """
  del train  # decides the augmentation alone, which comes with the rng
  return CaptionTransform(
    tokenizer,
    reader.reader(config),
    prompt(config, tokenizer),
    **{name: config.data[name] for name in ("captions_per_image", "max_caption")},
  )
