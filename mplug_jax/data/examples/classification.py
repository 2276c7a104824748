"""Statements about one or two images and their classes: SNLI-VE, NLVR2, one's own data, generated scenes.

A record is {"images": [image, ...], "id": str | int, "sentence": str, "label": str, "" when unknown}, an image as
`image_ops.decode_image` takes it; of generated scenes it also has "more", a function (rng, count) -> at most so many
(sentence, label) about the same images. A source has `len(source)`, `source[i]`, and without pixels `source.row(i)` (the record
but for its images), `source.groups(i)` (names of subsets that the record belongs to).
"""

import os

import numpy as np

from mplug_jax.data.images import reader
from mplug_jax.data.sources import scenes as scene_sources
from mplug_jax.data.sources import text_assignment
from mplug_jax.data.storage import annotations, archives, packed
from mplug_jax.data.text import cleaning, token_rows
from mplug_jax.scenes import pairs, statements
from mplug_jax.scenes import scene as scenes

_OTHER_SIDE = {"left": "right", "right": "left"}


def get_source(data, split):
  """The records of one split.

  Args:
    data: config.data with `name`, `labels` (the classes), `images_per_text`, and the keys of that source:
      nlvr2, snli_ve: train_files (list), val_file, test_file in the official json format, image_root.
      jsonl: the same keys, any format of json_records.entries; an object a line or row: image or images, sentence, label, and
        optionally id.
      captions: the same keys; entries {"image", "caption": str or list of str}, see text_assignment.py; seed.
      scenes, scene_captions: size, seed, difficulty of `scenes.SceneConfig`; scenes: easier, a share, see scene_statements.py.
      All sources of files: fields, see json_records.Fields.
    split: "train", "val" or "test". Only "train" insists on labels.

  Raises:
    ValueError: unknown name or split, unset key, malformed file (names file and entry).
    FileNotFoundError: a file or one of the first images is missing.
  """
  builders = {
    "nlvr2": _nlvr2,
    "snli_ve": _snli_ve,
    "jsonl": _jsonl,
    "captions": _captions,
    "scenes": _scene_statements,
    "scene_captions": _scene_captions,
  }
  if data.name not in builders:
    raise ValueError(f"config.data.name={data.name!r} is not one of {', '.join(builders)}.")
  if split not in ("train", "val", "test"):
    raise ValueError(f"Split {split!r} does not exist; known splits: train, val, test.")
  if len(set(data.labels)) < max(2, len(data.labels)):
    raise ValueError(
      f"config.data.labels={tuple(data.labels)!r} must list the classes: at least two, none of them twice."
    )
  return builders[data.name](data, split)


def texts(source, records=0):
  """Cleaned sentences of `records` records, evenly spaced, 0 for all."""
  for index in range(0, len(source), max(1, len(source) // records) if records else 1):
    sentence = source.row(index)["sentence"]
    yield cleaning.pre_caption(sentence, len(sentence))


# ---- sources


class Records:
  """A sequence of records as a source."""

  def __init__(self, records):
    self._records = records

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index):
    return self._records[index]

  def row(self, index):
    """A record without its images."""
    return {name: value for name, value in self._records[index].items() if name != "images"}

  def groups(self, index):
    """Files name no subsets."""
    del index
    return ()


class _SceneRecords:
  """Records of scene_pairs.py, which a subclass finds by number."""

  def __init__(self, config, split, easier):
    self._config, self._split, self._easier = config, split, easier

  def __len__(self):
    return scenes.split_size(self._split)

  def row(self, index):
    """A record without its images."""
    return self._row(index, self._found(index))

  def _row(self, index, found):
    return {"id": f"{self._split}-{index}", "sentence": found.text, "label": str(found.label)}


class _Pairs(_SceneRecords):
  """Labels "True" and "False"; subsets by the quantity that a statement is about and by what it says of it."""

  def __getitem__(self, index):
    pair = self._found(index)
    return self._row(index, pair) | {
      "images": [scenes.render(scene, self._config) for scene in (pair.left, pair.right)],
      "more": lambda rng, count: statements.pair_statements(
        rng, pair.left, pair.right, count, self._easier
      ),
    }

  def _found(self, index):
    return pairs.pair(self._config, self._split, index)

  def groups(self, index):
    pair = self._found(index)
    kind, content, _ = pairs.PAIR_TEMPLATES[pair.template]
    return (
      content,
      kind,
      *(_novelty(pair) if content == "object" else ()),
    )  # others name no pair of shape and colour


class _Hypotheses(_SceneRecords):
  """Labels of scene_pairs.LABELS; subsets by the relation."""

  def __getitem__(self, index):
    found = self._found(index)
    return self._row(index, found) | {
      "images": [scenes.render(found.premise, self._config)],
      "more": lambda rng, count: statements.hypotheses(rng, found.premise, count, self._easier),
    }

  def _found(self, index):
    return pairs.entailment(self._config, self._split, index)

  def groups(self, index):
    found = self._found(index)
    relation = found.form.relations[0][0]
    kind = (
      "size"
      if relation in ("larger", "smaller")
      else "side"
      if relation in _OTHER_SIDE
      else "height"
    )
    return kind, *_novelty(found)


def _novelty(found):
  """Whether a statement names a pair of shape and colour that training never shows."""
  return ("unseen",) if found.unseen else ("seen",)


def _scene_statements(data, split):
  kinds = {1: _Hypotheses, 2: _Pairs}
  if data.images_per_text not in kinds:
    raise ValueError(
      f"config.data.images_per_text={data.images_per_text} must be 1 or 2 for generated scenes."
    )
  return kinds[data.images_per_text](scene_sources.scene_config(data), split, data.easier)


def _scene_captions(data, split):
  captions = scene_sources.SceneCaptions(scene_sources.scene_config(data), split)
  return text_assignment.TextAssignment(captions, data.labels, data.seed)


def _images(entry, key, count, where):
  """The image names of an entry, of which there are `count`."""
  names = annotations.text_list(entry, key, where)
  if len(names) != count:
    raise ValueError(
      f"{where}: {key} names {len(names)} images, but config.data.images_per_text is {count}."
    )
  return names


def _label(entry, data, where):
  """The class of an entry as text; "" when it has none."""
  if "label" not in entry:
    return ""
  label = str(entry["label"])  # json's true is "True", as the official files write it
  if label not in data.labels:
    raise ValueError(
      f"{where}: label {label!r} is not one of config.data.labels, {', '.join(data.labels)}."
    )
  return label


def _read(data, split, key, rename=lambda names: names):
  """The split's files -> Records. `key`: the field that names the images. `rename`: those names -> below config.data.image_root."""
  records, path_of = packed.Packed(("images", "id", "sentence", "label")), annotations.ImagePaths()
  keys = ("sentence", key, "label") if split == "train" else ("sentence", key)
  for entry, where in annotations.split_entries(data, split, keys, ("label", "id")):
    annotations.require_texts(entry, ("sentence",), where)
    names = rename(_images(entry, key, data.images_per_text, where))
    records.append(
      {
        "images": [path_of(data.image_root, "image_root", name, where) for name in names],
        "id": entry.get("id", len(records)),
        "sentence": entry["sentence"],
        "label": _label(entry, data, where),
      }
    )
  return Records(records)


def _nlvr2(data, split):
  there = (
    None  # whether training images are where they are said to be; the first one answers for all
  )

  def rename(
    names,
  ):  # the official code reads all training images from one folder, whatever the names say
    nonlocal there
    if "train" not in names[0]:
      return names
    if there is None:
      there = archives.is_file(os.path.join(data.image_root or "", names[0]))
    return names if there else [f"train/{os.path.basename(name)}" for name in names]

  return _read(data, split, "images", rename)


def _snli_ve(data, split):
  return _read(data, split, "image", lambda names: [f"{name}.jpg" for name in names])


def _jsonl(data, split):
  return _read(data, split, "image" if data.images_per_text == 1 else "images")


def _captions(data, split):
  records, path_of = packed.Packed(("image", "image_id", "captions")), annotations.ImagePaths()
  for entry, where in annotations.split_entries(data, split, ("image", "caption")):
    annotations.require_texts(entry, ("image",), where)
    captions = annotations.text_list(entry, "caption", where)
    if not captions:
      raise ValueError(f"{where}: the list of captions is empty.")
    records.append(
      {
        "image": path_of(data.image_root, "image_root", entry["image"], where),
        "image_id": entry["image"],
        "captions": captions,
      }
    )
  return text_assignment.TextAssignment(records, data.labels, data.seed)


# ---- examples


def _turned(text):
  """The words left and right exchanged."""
  return " ".join(_OTHER_SIDE.get(word, word) for word in text.split(" "))


class ClassificationTransform:
  """A transform for `pipeline`: called with (index, record, rng), returns an example.

  Its keys: image u8[N, S, S, 3], not normalised; sentence i32[Q, L], padded with the pad id; label i32[Q], the class's place in
  `labels`, -1 = unknown; corrupt bool[], an image could not be read; index i32[]. In evaluation Q is 1.

  Args:
    tokenizer: see tokenizer.py. images: an ImageReader. labels: the classes' names.
    max_words: of a sentence, the rest is cut. max_text: L, tokens with [bos]; the rest is cut.
    swap: probability, in training, of exchanging the images and in the sentence the words left and right, on copies
      (docs/official.md item 36). Right where these words tell the images apart; a relation inside an image would be reversed.
    mirror: probability, in training, of the mirror image of everything: every image, their order, the words left and right.
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
          f"config.data.sentences_per_row={self._sentences} needs generated scenes; other data has one sentence a row."
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
  """The transform that config.data and config.model describe; without draws when not `train`, for the pipeline then gives no rng."""
  del train
  return ClassificationTransform(
    tokenizer,
    reader.reader(config),
    sentences=config.data.sentences_per_row,
    **{name: config.data[name] for name in ("labels", "max_words", "max_text", "swap", "mirror")},
  )
