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
    image = _find(builder.info.features, self._paths["image"])
    if not isinstance(image, features.Image):
      raise ValueError(f"{self.name}: {self._paths['image']} is no Image but a {type(image).__name__}.")

  def _find_fields(self, features, data, required, optional):
    """{our key: path} of the fields that are there."""
    fields = json_records.Fields({"fields": data["fields"] or "", "name": "tfds"}, required, ("image", *optional))
    defaults, found = FIELDS.get(self.name.split("/")[0], {}), {}
    for key in fields.known:
      named = fields.theirs(key)
      path = named if named != key else defaults.get(key, key)
      if _find(features, path) is not None:
        found[key] = path
      elif key in required or named != key:
        known = sorted(_paths(features))
        raise ValueError(f"{self.name} has no field {path!r} for our {key}; it has {', '.join(known[:_LISTED])}"
                         f"{' ...' * (len(known) > _LISTED)}; name it with --config.data.fields={key}=...")
    return found

  def __len__(self):
    return len(self._records)

  def read(self, index, *keys):
    """{our key: list of the values} of those fields of a record that exist; of a sequence in a sequence, a list of lists.

    The record is a tf.train.Example, in which a sequence is a list, and one in another a list with the lengths of its parts.

    Raises:
      ValueError: it is damaged.
    """
    from google.protobuf import message
    from tensorflow_datasets.proto import tf_example_pb2
    try:
      there = tf_example_pb2.Example.FromString(self._records[index]).features.feature
    except (RuntimeError, message.DecodeError) as error:
      what = str(error).splitlines()[0].rstrip(".")
      raise ValueError(f"Record {index} of {self.name}, split {self.split}, is damaged ({what}).") from None
    found = {}
    for key in filter(self._paths.get, keys):
      path = self._paths[key]
      if path in there:
        found[key] = _values(there[path])
      elif f"{path}/ragged_flat_values" in there:
        values = iter(_values(there[f"{path}/ragged_flat_values"]))
        found[key] = [list(itertools.islice(values, length)) for length in _values(there[f"{path}/ragged_row_lengths_0"])]
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
  if len(data["splits"]) != 3:
    raise ValueError(f"config.data.splits={data['splits']!r} must name three splits, those to train, validate and test on.")
  named = dict(zip(("train", "val", "test"), data["splits"]))[split]
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
  """The feature at a path, whose names may themselves be written with "/", as image/id is; None if there is none."""
  inside = _inner(features) or {}
  if path in inside:
    return inside[path]
  return next((found for name in inside if path.startswith(f"{name}/")
               and (found := _find(inside[name], path[len(name) + 1:])) is not None), None)


def _paths(features):
  """All paths of a set."""
  for name, feature in (_inner(features) or {}).items():
    if _inner(feature) is None:
      yield name
    else:
      yield from (f"{name}/{rest}" for rest in _paths(feature))


def _values(feature):
  """A tf.train.Feature -> list."""
  return list(getattr(feature, feature.WhichOneof("kind") or "bytes_list").value)


def _texts(values, where):
  """Values of a field -> list of strings. Raises ValueError."""
  try:
    return [value.decode("utf-8") if isinstance(value, bytes) else str(value) for value in values]
  except UnicodeDecodeError:
    raise ValueError(f"{where}: a text is not UTF-8.") from None


class _Source:
  """Records {"image", "image_id", what a subclass adds}, of whole examples or, if `each`, of every entry of them alone."""

  def __init__(self, split, each=False):
    self._split, self._record, self._entry = split, None, None
    if each:
      counts = np.array([len(self._entries(number)) for number in range(len(split))], np.int64)
      self._record = np.repeat(np.arange(len(split)), counts)
      self._entry = np.arange(len(self._record)) - np.repeat(np.cumsum(counts) - counts, counts)

  def __len__(self):
    return len(self._split if self._record is None else self._record)

  def _number(self, index):
    return int(index if self._record is None else self._record[index])

  def _where(self, number):
    return f"{self._split.name}, split {self._split.split}, record {number}"

  def _entries_of(self, index):
    """The entries of a record."""
    entries = self._entries(self._number(index))
    return entries if self._record is None else [entries[self._entry[index]]]

  def _image(self, index):
    number = self._number(index)
    found = self._split.read(number, "image", "image_id")
    ids = _texts(found.get("image_id", ()), self._where(number)) or [f"{self._split.name}/{self._split.split}/{number}"]
    return {"image": found["image"][0], "image_id": ids[0]}


class Captions(_Source):
  """A source of images, see caption.py; captions are lower-cased. Counting them reads every record once."""

  def __init__(self, data, split):
    super().__init__(_Split(data, split, ("image", "caption") if split == "train" else ("image",), ("caption", "image_id")))

  def __getitem__(self, index):
    return self._image(index) | {"captions": self.captions(index)}

  def _entries(self, number):
    return [text.lower() for text in _texts(self._split.read(number, "caption").get("caption", ()), self._where(number))]

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
    read = self._split.read(number, "question_id", "question", "answer")
    columns = (_texts(read.get(key, ()), self._where(number)) for key in ("question_id", "question", "answer"))
    found = {}
    for row, (key, text, answer) in enumerate(itertools.zip_longest(*columns)):
      key = f"{number}-{row}" if key is None else key
      question = found.setdefault(key, {"question_id": key, "question": text, "answers": [], "weights": None, "ocr": "", "objects": "",
                                        "dataset": "tfds"})
      question["answers"] += [answer] if answer else []
    return list(found.values())


class Expressions(_Source):
  """A source of referring expressions, see grounding_sources.py. An empty box means that it is not known."""

  def __init__(self, data, split):
    self._training = split == "train"
    keys = ("image", "text", "box") if self._training else ("image", "text")
    super().__init__(_Split(data, split, keys, ("box", "id", "image_id")), each=data["expressions_per_image"] == 1)

  def __getitem__(self, index):
    return self._image(index) | {"expressions": self.expressions(index)}

  def expressions(self, index):
    return self._entries_of(index)

  def _entries(self, number):
    where, found = self._where(number), []
    read = self._split.read(number, "image", "text", "box", "id")
    size, texts = _size(read["image"][0]), read["text"]
    shares = np.reshape(read["box"], (-1, 4)) if "box" in read else np.zeros((len(texts), 4))
    if len(shares) != len(texts):
      raise ValueError(f"{where} has {len(shares)} boxes and {len(texts)} texts.")
    for row, said in enumerate(texts):
      box = _corners(shares[row], *size)
      if box is None and self._training:
        raise ValueError(f"{where}: box {row} is empty; a training expression needs one.")
      said = _texts(said if isinstance(said, list) else [said], where)
      ids = read["id"][row] if "id" in read else [f"{number}-{row}-{i}" for i in range(len(said))]
      ids = _texts(ids if isinstance(ids, list) else [ids], where)
      found += [{"id": key, "text": text, "box": box} for key, text in zip(ids, said)]
    return found


def _size(image):
  """(width, height) of an encoded image, by its header. One that cannot be read is left to the reader of images."""
  try:
    with Image.open(io.BytesIO(image)) as opened:
      return opened.size
  except Exception:  # decoders raise anything on damaged bytes
    return 1, 1


def _corners(box, width, height):
  """BBoxFeature (top, left, bottom, right) as shares -> (x1, y1, x2, y2) in pixels; None if it is empty."""
  top, left, bottom, right = map(float, box)
  return (left * width, top * height, right * width, bottom * height) if bottom > top and right > left else None
