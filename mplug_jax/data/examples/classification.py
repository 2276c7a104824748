"""Statements about one or two images, and their classes: SNLI-VE, NLVR2, user data, scenes.

A record is {"images": [image, ...], "id": str | int, "sentence": str, "label": str, "" if unknown};
images are as `images.ops.decode_image` takes them. Records of generated scenes also have "more", a
function (rng, count) -> at most `count` (sentence, label) about the same images. A source has
`len(source)`, `source[i]`, and without pixels `source.row(i)` (the record without its images) and
`source.groups(i)` (names of the subsets that the record belongs to).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mplug_jax.config import Config
from mplug_jax.data.examples import record_view
from mplug_jax.data.images import reader
from mplug_jax.data.sources.classification import (
  OTHER_SIDE,
  caption_pairs,
  jsonl,
  nlvr2,
  scene_captions,
  scene_statements,
  snli_ve,
)
from mplug_jax.data.text import cleaning, token_rows
from mplug_jax.data.text.tokenizer_base import Tokenizer
from mplug_jax.data.types import Example, Record, Source


def get_source(data: Config, split: str) -> Source:
  """Returns the records of one split.

  config.data has `name`, `labels` (the classes), `images_per_text` and the keys of the source:

  nlvr2, snli_ve: train_files (list), val_file, test_file in the official JSON format, image_root;
  jsonl: the same keys, any format of annotation files; an entry has image or images, sentence,
    label, and optionally id;
  captions: the same keys; entries {"image", "caption": str or list of str}, see
    text_assignment.py; seed;
  scenes, scene_captions: size, seed, difficulty of `SceneConfig`; scenes: easy_fraction, see
    scenes/statements.py.

  All sources of files take `fields`, names of the keys in the files.

  Args:
    data: config.data.
    split: "train", "val" or "test". Only "train" requires labels.

  Raises:
    ValueError: unknown name or split, unset key, malformed file (names file and entry).
    FileNotFoundError: a file or one of the first images is missing.
  """
  builders = {
    "nlvr2": nlvr2,
    "snli_ve": snli_ve,
    "jsonl": jsonl,
    "captions": caption_pairs,
    "scenes": scene_statements,
    "scene_captions": scene_captions,
  }
  if data.name not in builders:
    raise ValueError(f"config.data.name={data.name!r} is not one of {', '.join(builders)}.")
  if split not in ("train", "val", "test"):
    raise ValueError(f"Split {split!r} does not exist; known splits: train, val, test.")
  if len(set(data.labels)) < max(2, len(data.labels)):
    raise ValueError(
      f"config.data.labels={tuple(data.labels)!r} must list the classes: at least two, none of "
      f"them twice."
    )
  return builders[data.name](data, split)


def texts(source: Any, records: int = 0) -> Iterator[str]:
  """Yields cleaned sentences.

  Args:
    source: training records, with a method `row`.
    records: number of records, evenly spaced; 0 = all.
  """
  for index in range(0, len(source), max(1, len(source) // records) if records else 1):
    sentence = source.row(index)["sentence"]
    yield cleaning.pre_caption(sentence, len(sentence))


# ---- examples


def _turned(text: str) -> str:
  """Exchanges the words left and right."""
  return " ".join(OTHER_SIDE.get(word, word) for word in text.split(" "))


class ClassificationTransform:
  """Transform for `pipeline`: called with (index, record, rng), it returns an example.

  The keys of an example are image u8[N, S, S, 3], not normalized; sentence i32[Q, L], padded with
  the pad id; label i32[Q], index of the class in `labels`, -1 = unknown; corrupt bool[], True if an
  image is unreadable; index i32[]. In evaluation Q is 1.

  A call raises ValueError for a record without further sentences if Q > 1.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    images: reader.ImageReader,
    *,
    labels: Sequence[str],
    max_words: int,
    max_text: int,
    swap: float = 0.0,
    mirror: float = 0.0,
    sentences: int = 1,
  ):
    """Makes the transform.

    Args:
      tokenizer: tokenizer of the run.
      images: reads the images.
      labels: names of the classes.
      max_words: words of a sentence; the rest is cut.
      max_text: L, tokens with [bos]; the rest is cut.
      swap: probability, in training, of exchanging the images and, in the sentence, the words left
        and right, on copies (docs/official.md item 36). Correct if these words name the images; a
        relation inside an image would be reversed.
      mirror: probability, in training, of mirroring every image, the order of the images, and the
        words left and right.
      sentences: Q in training: the sentence of the record and further ones, drawn for each example.
    """
    self._sentences = sentences
    self._images = images
    self._labels = tuple(labels)
    self._max_words = max_words
    self._rows = token_rows.TokenRows(tokenizer, max_text)
    self._swap = swap
    self._mirror = mirror

  def __call__(self, index: int, record: Record, rng: np.random.Generator | None) -> Example:
    """Makes an example; `rng` is None in evaluation."""
    statements = [(record["sentence"], record["label"])]
    images = list(record["images"])
    swap, mirror = (False, False) if rng is None else rng.random(2) < (self._swap, self._mirror)
    if rng is not None and self._sentences > 1:
      if "more" not in record:
        raise ValueError(
          f"config.data.sentences_per_row={self._sentences} needs generated scenes; other data "
          f"has one sentence a row."
        )
      statements += record["more"](rng, self._sentences - 1)
      missing = self._sentences - len(statements)
      statements += [("", "")] * missing  # without a label, and so without weight
    texts = [cleaning.pre_caption(text, self._max_words) for text, _ in statements]
    for exchange in (swap, mirror):
      if exchange:
        texts = [_turned(text) for text in texts]
        images = images[::-1]
    pixels, unreadable = zip(*(self._images(image, record["id"], rng) for image in images))
    pixels = np.stack(pixels)
    return {
      "image": pixels[:, :, ::-1].copy() if mirror else pixels,
      "sentence": np.stack([self._rows(text) for text in texts]),
      "label": np.array(
        [self._labels.index(label) if label else -1 for _, label in statements], np.int32
      ),
      "corrupt": np.bool_(any(unreadable)),
      "index": np.int32(index),
    }


def make_transform(config: Config, tokenizer: Tokenizer, train: bool) -> ClassificationTransform:
  """Returns the transform that config.data and config.model describe.

  Args:
    config: config of the run.
    tokenizer: tokenizer of the run.
    train: unused; an example has draws if the pipeline passes a generator.
  """
  del train
  data = config.data
  return ClassificationTransform(
    tokenizer,
    reader.reader(config),
    labels=data.labels,
    max_words=data.max_words,
    max_text=data.max_text,
    swap=data.swap,
    mirror=data.mirror,
    sentences=data.sentences_per_row,
  )


def _item(record: Record, data: Config) -> record_view.Item:
  sentence = record["sentence"]
  label = record["label"]
  return record_view.Item(
    images=record["images"],
    ids=[record["id"]],
    texts=[record_view.cleaned("sentence", sentence, data.max_words)],
    shown=[(sentence, label or "(no label)")],
    label=label,
  )


VIEW = record_view.View(
  source=get_source,
  item=_item,
  entries="statements",
  limits={"sentence": record_view.Limit("max_text", ends=False)},
)
