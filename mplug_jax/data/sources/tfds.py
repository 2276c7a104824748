"""TensorFlow Datasets sets as sources, see storage/tfds_reader.py.

Fields of captioning and retrieval: image, caption (one text or a sequence of them); of VQA: image,
question, answer, question_id (sequences; rows that share an id are one question with several
answers); of grounding: image, text, box (BBoxFeature; a text for each box, or a sequence of them)
and id; of all: image_id.
"""

import abc
import io
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from mplug_jax.data.errors import BadRecords, RecordError
from mplug_jax.data.sources import entry_ids
from mplug_jax.data.sources.source import Record
from mplug_jax.data.storage import tfds_reader


class _Source(abc.ABC):
  """Records {"image", "image_id", NAME: entries}.

  Attributes:
    NAME: key of the entries.
    KEYS: the fields that they are made of.
    ID: key of their ids.
  """

  NAME = ""
  KEYS: tuple[str, ...] = ()
  ID = ""

  def __init__(self, split: tfds_reader.Split, name: str, one_entry: bool = False):
    """Makes the source.

    Args:
      split: the split.
      name: "train", "val" or "test"; ids of entries in the others must differ.
      one_entry: make a record of every entry, instead of every example.

    Raises:
      ValueError: two entries have the same id.
    """
    self._split = split
    self._record: np.ndarray | None = None  # example of each record
    self._entry = np.zeros(0, np.int64)  # entry of each record
    counts = self._counts(name) if one_entry or name != "train" else np.zeros(0, np.int64)
    if one_entry:
      self._record = np.repeat(np.arange(len(split)), counts)
      self._entry = np.arange(len(self._record)) - np.repeat(np.cumsum(counts) - counts, counts)

  def _counts(self, name: str) -> Int[np.ndarray, "examples"]:
    """Returns the number of entries of every example, and checks their ids."""
    ids = entry_ids.EntryIds(self.ID, name)
    counts = np.zeros(len(self._split), np.int64)
    for number in range(len(counts)):
      entries = self._entries_of(number)
      counts[number] = len(entries)
      for row, entry in enumerate(entries):
        ids.add(entry[self.ID], f"{self._location(number)}, {self.NAME} {row}")
    return counts

  def __len__(self) -> int:
    return len(self._split if self._record is None else self._record)

  def __getitem__(self, index: int) -> Record:
    number = self._number(index)
    fields = self._split.read(number, "image", "image_id", *self.KEYS)
    return {
      "image": fields["image"][0],
      "image_id": self._image_id(number, fields),
      self.NAME: self._select(self._entries(fields, number), index),
    }

  def _image_id(self, number: int, fields: Mapping[str, list] | None = None) -> str:
    """Returns the id of an example's image, from its fields if they are read."""
    fields = self._split.read(number, "image_id") if fields is None else fields
    ids = self._split.texts(fields.get("image_id", ()), self._location(number))
    return ids[0] if ids else f"{self._split.name}/{self._split.split}/{number}"

  def entries(self, index: int) -> list:
    """Returns the entries of a record, without its image."""
    return self._select(self._entries_of(self._number(index)), index)

  def _number(self, index: int) -> int:
    """Returns the number of a record's example."""
    return int(index if self._record is None else self._record[index])

  def _select(self, entries: list, index: int) -> list:
    """Returns those entries of an example that belong to a record."""
    return entries if self._record is None else [entries[self._entry[index]]]

  def _entries_of(self, number: int) -> list:
    """Reads the entries of an example."""
    return self._entries(self._split.read(number, *self.KEYS), number)

  @abc.abstractmethod
  def _entries(self, fields: Mapping[str, list], number: int) -> list:
    """Returns the entries in the fields of an example."""

  def _location(self, number: int) -> str:
    """Names an example in messages."""
    return f"{self._split.name}, split {self._split.split}, record {number}"


class Captions(_Source):
  """A source of images, see caption.py.

  Captions are in lower case. Counting them reads every record once.
  """

  NAME = "captions"
  KEYS = ("caption",)

  def __init__(self, data: Mapping[str, Any], split: str):
    required = ("image", "caption") if split == "train" else ("image",)
    fields = tfds_reader.Split(data, split, required, ("caption", "image_id"))
    super().__init__(fields, split)

  def _counts(self, name: str) -> Int[np.ndarray, "examples"]:
    """Checks the ids of the images; returns zeros, because records are examples."""
    ids = entry_ids.EntryIds("image_id", name)
    given = len(self._split) and "image_id" in self._split.read(0, "image_id")
    for number in range(len(self._split) if given else 0):
      ids.add(self._image_id(number), self._location(number))
    return np.zeros(0, np.int64)

  def _entries(self, fields: Mapping[str, list], number: int) -> list[str]:
    captions = self._split.texts(fields.get("caption", ()), self._location(number))
    return [text.lower() for text in captions]

  captions = _Source.entries

  def counts(self) -> Int[np.ndarray, "images"]:
    """Returns the number of captions of every image."""
    return np.array([len(self.entries(index)) for index in range(len(self))], np.int64)

  def group(self, index: int) -> None:
    """Returns None, because no set names subsets."""


class Questions(_Source):
  """A source of VQA records, see vqa.py."""

  NAME = "questions"
  KEYS = ("question_id", "question", "answer")
  ID = "question_id"

  def __init__(self, data: Mapping[str, Any], split: str):
    required = ("image", "question", "answer") if split == "train" else ("image", "question")
    fields = tfds_reader.Split(data, split, required, ("answer", "question_id", "image_id"))
    super().__init__(fields, split, one_entry=data["questions_per_image"] == 1)

  questions = _Source.entries

  def _entries(self, fields: Mapping[str, list], number: int) -> list[Record]:
    location = self._location(number)
    columns = [self._split.texts(fields.get(key, ()), location) for key in self.KEYS]
    for key, column in zip(self.KEYS, columns):
      if column and len(column) != len(columns[1]):
        raise ValueError(
          f"{location} has {len(columns[1])} values of question and {len(column)} of {key}; it "
          "needs as many."
        )
    questions: dict[tuple[str, str], Record] = {}
    for row, (key, text, answer) in enumerate(itertools.zip_longest(*columns)):
      key = f"{number}-{row}" if key is None else key
      question = questions.setdefault(
        (key, text),  # different questions with one id are not merged
        {
          "question_id": key,
          "question": text,
          "answers": [],
          "weights": None,
          "ocr": "",
          "objects": "",
          "dataset": "tfds",
        },
      )
      if answer:
        question["answers"].append(answer)
    return list(questions.values())


class Expressions(_Source):
  """A source of referring expressions, see grounding.py.

  An empty box is unknown; training leaves its expression out, counts it and names it in the log.

  Attributes:
    bad: count of the boxes whose expressions training leaves out, of the records read so far.
  """

  NAME = "expressions"
  KEYS = ("image", "text", "box", "id")
  ID = "id"

  def __init__(self, data: Mapping[str, Any], split: str):
    self._training = split == "train"
    self.bad = BadRecords(data.get("strict", False))
    self._counted: set[tuple[int, int]] = set()  # (example, row) of those in `bad`
    required = ("image", "text", "box") if self._training else ("image", "text")
    fields = tfds_reader.Split(data, split, required, ("box", "id", "image_id"))
    super().__init__(fields, split, one_entry=data["expressions_per_image"] == 1)

  expressions = _Source.entries

  def _entries(self, fields: Mapping[str, list], number: int) -> list[Record]:
    location = self._location(number)
    size = _size(fields["image"][0])
    objects = fields["text"]
    boxes = np.reshape(fields["box"], (-1, 4)) if "box" in fields else np.zeros((len(objects), 4))
    if len(boxes) != len(objects):
      raise ValueError(f"{location} has {len(boxes)} boxes and {len(objects)} texts.")
    expressions: list[Record] = []
    for row, value in enumerate(objects):
      box = _corners(boxes[row], *size)
      if box is None and self._training:
        if (number, row) not in self._counted:
          self.bad.add(
            RecordError(f"{location}: box {row} is empty; a training expression needs one.")
          )
          self._counted.add((number, row))
        continue
      texts = self._split.texts(value if isinstance(value, list) else [value], location)
      ids = (
        fields["id"][row] if "id" in fields else [f"{number}-{row}-{i}" for i in range(len(texts))]
      )
      ids = self._split.texts(ids if isinstance(ids, list) else [ids], location)
      if len(ids) != len(texts):
        raise ValueError(f"{location}: box {row} has {len(texts)} texts and {len(ids)} ids.")
      expressions += [{"id": key, "text": text, "box": box} for key, text in zip(ids, texts)]
    return expressions


def _size(image: bytes) -> tuple[int, int]:
  """Returns (width, height) of an encoded image from its header; (1, 1) if it is damaged."""
  try:
    with Image.open(io.BytesIO(image)) as opened:
      return opened.size
  except Exception:  # decoders raise anything on damaged bytes; the image reader reports them
    return 1, 1


def _corners(box: np.ndarray, width: int, height: int) -> tuple[float, float, float, float] | None:
  """Converts a BBoxFeature (top, left, bottom, right), as shares, to corners in pixels.

  Returns:
    (x1, y1, x2, y2), or None if the box is empty or not finite.
  """
  top, left, bottom, right = map(float, box)
  if not np.isfinite(box).all() or bottom <= top or right <= left:
    return None
  return left * width, top * height, right * width, bottom * height
