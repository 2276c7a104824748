"""Sets of TensorFlow Datasets, prepared as array_record, as sources of captioning, retrieval, VQA and grounding; without TensorFlow.

A set is read from its files alone, and of a record only the fields that are needed; images stay encoded until our own decoder reads them.
A field is named by its path, as captions/text for the field text of the sequence captions. config.data.fields names those that are called
otherwise, "caption=captions/raw,image=photo"; what is known without it is in FIELDS. Fields of captioning and retrieval: image, caption
(one text or a sequence of them); of VQA: image, question, answer, question_id (sequences; rows that share an id are one question with
several answers); of grounding: image, text, box (BBoxFeature; a text for each box, or a sequence of them) and id; of all: image_id.
"""

import io
import itertools
import os

import numpy as np
from PIL import Image

from mplug_jax.data import json_records

FIELDS = {  # of a set, by its name: {our key: path}
    "coco_captions": {"caption": "captions/text", "image_id": "image/id"},
    "ref_coco": {"text": "objects/refexp/raw", "box": "objects/bbox", "image_id": "image/id", "id": "objects/refexp/refexp_id"},
    "mplug_captions": {"caption": "captions/text"},
    "mplug_questions": {"question": "questions/question", "answer": "questions/answer", "question_id": "questions/id"},
    "mplug_boxes": {"text": "objects/text", "box": "objects/bbox", "id": "objects/id"},
}
_ALIASES = {"val": ("val", "validation"), "test": ("test",)}
_LISTED = 20  # fields that a message names


class _Split:
  """Random access to some fields of one split; can be sent to other processes, which open its files anew.

  Args:
    data: config.data with builder, data_dir, splits and fields. split: "train", "val" or "test".
    required, optional: our keys of fields.

  Raises:
    ValueError: no set is named, it is prepared in another format, or has no such split or field.
    FileNotFoundError: it is not prepared.
  """

  def __init__(self, data, split, required, optional):
    self._arguments = {key: data.get(key) for key in ("name", "builder", "data_dir", "splits", "fields")}, split, required, optional
    self._open()

  def __getstate__(self):
    return self._arguments

  def __setstate__(self, state):
    self._arguments = state
    self._open()

  def _open(self):
    from tensorflow_datasets import decode, features
    data, split, required, optional = self._arguments
    builder = _builder(data)
    if "array_record" not in (formats := sorted(found.value for found in builder.info.available_file_formats())):
      raise ValueError(f"{builder.data_path} is prepared as {', '.join(formats)}; prepare it anew with file_format=\"array_record\".")
    self.name, self.split = builder.info.full_name, _split_name(data, split, builder)
    self._records = builder.as_data_source(self.split, file_format="array_record", deserialize_method=decode.DeserializeMethod.RAW_BYTES)
    self._paths = self._find_fields(builder.info.features, data, required, optional)
    parts = {key: decode.PartialDecoding(_nested(path)).extract_features(builder.info.features) for key, path in self._paths.items()}
    image = _at(builder.info.features, self._paths["image"])
    skip = _nested(self._paths["image"], decode.SkipDecoding()) if isinstance(image, features.Image) else None
    self._features = {key: (part, skip if key == "image" else None) for key, part in parts.items()}

  def _find_fields(self, features, data, required, optional):
    """{our key: path as a tuple of names} of the fields that are there."""
    fields = json_records.Fields({"fields": data["fields"] or "", "name": "tfds"}, required, ("image", *optional))
    defaults, found = FIELDS.get(self.name.split("/")[0], {}), {}
    for key in fields.known:
      named = fields.theirs(key)
      path = named if named != key else defaults.get(key, key)
      if (names := _find(features, path)) is not None:
        found[key] = names
      elif key in required or named != key:
        known = list(_paths(features))
        raise ValueError(f"{self.name} has no field {path!r} for our {key}; it has {', '.join(known[:_LISTED])}"
                         f"{' ...' * (len(known) > _LISTED)}; name it with --config.data.fields={key}=...")
    return found

  def __len__(self):
    return len(self._records)

  def has(self, key):
    return key in self._paths

  def read(self, index, keys):
    """{our key: value} of the fields of a record that exist; texts are bytes, sequences arrays or lists."""
    raw = self._records[index]
    found = {}
    for key in filter(self.has, keys):
      features, decoders = self._features[key]
      found[key] = _at(features.deserialize_example_np(raw, decoders=decoders), self._paths[key])
    return found


def _builder(data):
  """The builder of config.data, from the files that it prepared."""
  try:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder
  except ImportError as error:
    raise ValueError(f"data=tfds:NAME needs the package tensorflow-datasets ({error}).") from None
  if not data["builder"]:
    raise ValueError("config.data.builder is not set: write data=tfds:NAME, NAME/CONFIG or NAME:VERSION.")
  place = os.path.expanduser(data["data_dir"]) if data["data_dir"] else None
  try:
    return read_only_builder.builder_from_files(data["builder"], data_dir=place)
  except tfds.core.registered.DatasetNotFoundError:
    raise FileNotFoundError(f"{data['builder']} is not prepared in {place or tfds.core.constants.DATA_DIR}; name the folder with root=, or "
                            "prepare it with file_format=\"array_record\" (docs/shards.md).") from None
  except (ValueError, OSError) as error:  # a malformed name, damaged files
    raise ValueError(f"{data['builder']} of TFDS cannot be read: {str(error).splitlines()[0].rstrip('.')}.") from None


def _split_name(data, split, builder):
  """The split of a set that serves as ours, checked."""
  named = dict(zip(("train", "val", "test"), data["splits"], strict=True))[split]
  if named == split:
    named = next((name for name in _ALIASES.get(split, ()) if name in builder.info.splits), named)
  try:
    builder.info.splits[named]  # also train[:90%] and train+restval
  except (KeyError, ValueError):
    raise ValueError(f"{builder.info.full_name} has no split {named!r} for our {split}; it has {', '.join(builder.info.splits)}; name one "
                     "in config.data.splits.") from None
  return named


def _inner(feature):
  """The features that a path goes on in: of a dict, or of a sequence of dicts; None if there are none."""
  feature = getattr(feature, "feature", feature)
  return feature if hasattr(feature, "keys") else None


def _find(features, path):
  """A path as it is written, "captions/text" or "image/id" -> its names ("captions", "text") or ("image/id",); None: no such field."""
  inside = _inner(features)
  if inside is None:
    return None
  for name in inside:
    if name == path:
      return (name,)
    if path.startswith(f"{name}/") and (rest := _find(inside[name], path[len(name) + 1:])) is not None:
      return (name, *rest)
  return None


def _paths(features):
  """All paths of a set."""
  for name, feature in (_inner(features) or {}).items():
    if _inner(feature) is None:
      yield name
    else:
      yield from (f"{name}/{rest}" for rest in _paths(feature))


def _nested(names, value=True):
  """("a", "b") -> {"a": {"b": value}}."""
  for name in reversed(names):
    value = {name: value}
  return value


def _at(features, names):
  """The feature, or the value, at a path."""
  for name in names:
    features = (_inner(features) or features)[name]
  return features


def _text(value, where):
  """A text of a record as a string. Raises ValueError."""
  value = value.item() if isinstance(value, np.generic | np.ndarray) and np.ndim(value) == 0 else value
  try:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
  except UnicodeDecodeError:
    raise ValueError(f"{where}: a text is not UTF-8.") from None


def _texts(value, where):
  """One text or a sequence of them -> list of strings."""
  return [_text(value, where)] if isinstance(value, bytes | str) or np.ndim(value) == 0 else [_text(part, where) for part in value]


class _Source:
  """Records {"image", "image_id", what a subclass adds}, of whole examples or, if `each`, of every entry of them alone."""

  def __init__(self, split, each=False):
    self._split, self._example, self._entry = split, None, None
    if each:
      counts = np.array([len(self._entries(index)) for index in range(len(split))], np.int64)
      self._example = np.repeat(np.arange(len(split)), counts)
      self._entry = np.arange(len(self._example)) - np.repeat(np.cumsum(counts) - counts, counts)

  def __len__(self):
    return len(self._split) if self._example is None else len(self._example)

  def _where(self, number):
    return f"{self._split.name}, split {self._split.split}, record {number}"

  def _entries_of(self, index):
    """The entries of a record."""
    if self._example is None:
      return self._entries(int(index))
    return [self._entries(int(self._example[index]))[self._entry[index]]]

  def _image(self, index):
    number = int(index if self._example is None else self._example[index])
    found = self._split.read(number, ("image", "image_id"))
    return {"image": found["image"], "image_id": _text(found["image_id"], self._where(number)) if "image_id" in found else
            f"{self._split.name}/{self._split.split}/{number}"}


class Captions(_Source):
  """A source of images, see caption.py; captions are lower-cased. Counting them reads every record once."""

  def __init__(self, data, split):
    super().__init__(_Split(data, split, ("image", "caption") if split == "train" else ("image",), ("caption", "image_id")))

  def __getitem__(self, index):
    return self._image(index) | {"captions": self.captions(index)}

  def _entries(self, number):
    return [text.lower() for text in _texts(self._split.read(number, ("caption",)).get("caption", ()), self._where(number))]

  def captions(self, index):
    return self._entries_of(index)

  def counts(self):
    """i64[N]: captions of every image."""
    return np.array([len(self._entries(number)) for number in range(len(self))], np.int64)

  def group(self, index):
    del index  # no set names parts


class Questions(_Source):
  """A source of VQA records, see sources.py."""

  def __init__(self, data, split):
    keys = ("image", "question", "answer") if split == "train" else ("image", "question")
    super().__init__(_Split(data, split, keys, ("answer", "question_id", "image_id")), each=data["questions_per_image"] == 1)

  def __getitem__(self, index):
    return self._image(index) | {"questions": self.questions(index)}

  def questions(self, index):
    return self._entries_of(index)

  def _entries(self, number):
    where, found = self._where(number), {}
    read = self._split.read(number, ("question", "answer", "question_id"))
    columns = [_texts(read[key], where) if key in read else [] for key in ("question_id", "question", "answer")]
    for row, (number_, text, answer) in enumerate(itertools.zip_longest(*columns)):
      key = f"{number}-{row}" if number_ is None else number_
      question = found.setdefault(key, {"question_id": key, "question": text, "answers": [], "weights": None, "ocr": "", "objects": "",
                                        "dataset": "tfds"})
      question["answers"] += [answer] if answer else []
    return list(found.values())


class Expressions(_Source):
  """A source of referring expressions, see grounding_sources.py. An empty box means that it is not known."""

  def __init__(self, data, split):
    keys = ("image", "text", "box") if split == "train" else ("image", "text")
    self._training = split == "train"
    super().__init__(_Split(data, split, keys, ("box", "id", "image_id")), each=data["expressions_per_image"] == 1)

  def __getitem__(self, index):
    return self._image(index) | {"expressions": self.expressions(index)}

  def expressions(self, index):
    return self._entries_of(index)

  def _entries(self, number):
    where, found = self._where(number), []
    read = self._split.read(number, ("image", "text", "box", "id"))
    size = _size(read["image"], where)
    texts = [read["text"]] if np.ndim(read.get("box", ((),))) == 1 else read["text"]
    boxes = np.reshape(read["box"], (-1, 4)) if "box" in read else [None] * len(texts)
    ids = read.get("id")
    for i, (said, box) in enumerate(zip(texts, boxes, strict=True)):
      box = None if box is None else _corners(box, *size)
      if box is None and self._training:
        raise ValueError(f"{where}: object {i} has an empty box; a training expression needs one.")
      said = _texts(said, where)
      numbers = [f"{number}-{i}-{j}" for j in range(len(said))] if ids is None else _texts(ids if np.ndim(ids) == 0 else ids[i], where)
      found += [{"id": key, "text": text, "box": box} for key, text in zip(numbers, said)]
    return found


def _size(image, where):
  """(width, height) of an encoded image, by its header, or of an array. One that cannot be read is left to the reader of images."""
  if isinstance(image, np.ndarray):
    return image.shape[1], image.shape[0]
  try:
    with Image.open(io.BytesIO(image)) as opened:
      return opened.size
  except Exception:  # decoders raise anything on damaged bytes
    return 1, 1


def _corners(box, width, height):
  """BBoxFeature (top, left, bottom, right) as shares -> (x1, y1, x2, y2) in pixels; None if it is empty."""
  top, left, bottom, right = (float(x) for x in box)
  return (left * width, top * height, right * width, bottom * height) if bottom > top and right > left else None
