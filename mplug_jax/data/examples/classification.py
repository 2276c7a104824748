"""Statements about one or two images and their classes: SNLI-VE, NLVR2, one's own data, generated scenes.

A record is {"images": [image, ...], "id": str | int, "sentence": str, "label": str, "" when unknown}, an image as
`image_ops.decode_image` takes it; of generated scenes it also has "more", a function (rng, count)
-> at most so many (sentence, label) about the same images. A source has `len(source)`, `source[i]`,
and without pixels `source.row(i)` (the record but for its images), `source.groups(i)` (names of
subsets that the record belongs to).
"""

import numpy as np

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


def get_source(data, split):
  """The records of one split.

  Args:
    data: config.data with `name`, `labels` (the classes), `images_per_text`, and the keys of that
      source: nlvr2, snli_ve: train_files (list), val_file, test_file in the official json format,
      image_root.
      jsonl: the same keys, any format of json_records.entries; an object a line or row: image or
        images, sentence, label, and optionally id.
      captions: the same keys; entries {"image", "caption": str or list of str}, see
        text_assignment.py; seed.
      scenes, scene_captions: size, seed, difficulty of `scenes.SceneConfig`; scenes: easy_fraction, a
        share, see scene_statements.py.
      All sources of files: fields, see json_records.Fields.
    split: "train", "val" or "test". Only "train" insists on labels.

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


def texts(source, records=0):
  """Cleaned sentences of `records` records, evenly spaced, 0 for all."""
  for index in range(0, len(source), max(1, len(source) // records) if records else 1):
    sentence = source.row(index)["sentence"]
    yield cleaning.pre_caption(sentence, len(sentence))


# ---- examples


def _turned(text):
  """The words left and right exchanged."""
  return " ".join(OTHER_SIDE.get(word, word) for word in text.split(" "))


class ClassificationTransform:
  """A transform for `pipeline`: called with (index, record, rng), returns an example.

  Its keys: image u8[N, S, S, 3], not normalised; sentence i32[Q, L], padded with the pad id; label
    i32[Q], the class's place in
  `labels`, -1 = unknown; corrupt bool[], an image could not be read; index i32[]. In evaluation Q
  is 1.

  Args:
    tokenizer: see tokenizer.py. images: an ImageReader. labels: the classes' names.
    max_words: of a sentence, the rest is cut. max_text: L, tokens with [bos]; the rest is cut.
    swap: probability, in training, of exchanging the images and in the sentence the words left and
      right, on copies (docs/official.md item 36). Right where these words tell the images apart; a
      relation inside an image would be reversed.
    mirror: probability, in training, of the mirror image of everything: every image, their order,
      the words left and right.
    sentences: Q in training, the record's own and more of the same kind, drawn anew every time.

  Raises (when called):
    ValueError: a record without more sentences, though Q > 1.
  """

  def __init__(
    self, tokenizer, images, *, labels, max_words, max_text, swap=0.0, mirror=0.0, sentences=1
  ):
    self._sentences = sentences
    self._images, self._labels, self._max_words = images, tuple(labels), max_words
    self._rows = token_rows.TokenRows(tokenizer, max_text)
    self._swap, self._mirror = swap, mirror

  def __call__(self, index, record, rng):
    said, images = [(record["sentence"], record["label"])], list(record["images"])
    swap, mirror = (False, False) if rng is None else rng.random(2) < (self._swap, self._mirror)
    if rng is not None and self._sentences > 1:
      if "more" not in record:
        raise ValueError(
          f"config.data.sentences_per_row={self._sentences} needs generated scenes; other data "
          f"has one sentence a row."
        )
      said += record["more"](rng, self._sentences - 1)
      said += [("", "")] * (self._sentences - len(said))  # without a label, and so without weight
    texts = [cleaning.pre_caption(text, self._max_words) for text, _ in said]
    for _ in range(int(swap) + int(mirror)):
      texts, images = [_turned(text) for text in texts], images[::-1]
    pixels, unreadable = zip(*(self._images(image, record["id"], rng) for image in images))
    pixels = np.stack(pixels)
    return {
      "image": pixels[:, :, ::-1].copy() if mirror else pixels,
      "sentence": np.stack([self._rows(text) for text in texts]),
      "label": np.array(
        [self._labels.index(label) if label else -1 for _, label in said], np.int32
      ),
      "corrupt": np.bool_(any(unreadable)),
      "index": np.int32(index),
    }


def make_transform(config, tokenizer, train):
  """The transform that config.data and config.model describe.

  Without draws when not `train`, for the pipeline then gives no rng.
  """
  del train
  return ClassificationTransform(
    tokenizer,
    reader.reader(config),
    sentences=config.data.sentences_per_row,
    **{name: config.data[name] for name in ("labels", "max_words", "max_text", "swap", "mirror")},
  )
