"""Sets of TensorFlow Datasets as sources of captioning, retrieval, VQA and grounding, see tfds_split.py.

Fields of captioning and retrieval: image, caption (one text or a sequence of them); of VQA: image,
question, answer, question_id (sequences; rows that share an id are one question with several
answers); of grounding: image, text, box (BBoxFeature; a text for each box, or a sequence of them)
and id; of all: image_id.
"""

import io
import itertools

import numpy as np
from PIL import Image

from mplug_jax.data.storage import tfds_reader


class _Source:
  """Records {"image", "image_id", NAME: entries}, of whole examples or, if `each`, of every entry of them alone."""

  NAME, KEYS = "", ()  # of the entries, and of the fields that they are made of

  def __init__(self, split, each=False):
    self._split, self._record, self._entry = split, None, None
    if each:
      counts = np.array([len(self._entries_of(number)) for number in range(len(split))], np.int64)
      self._record = np.repeat(np.arange(len(split)), counts)
      self._entry = np.arange(len(self._record)) - np.repeat(np.cumsum(counts) - counts, counts)

  def __len__(self):
    return len(self._split if self._record is None else self._record)

  def __getitem__(self, index):
    number = self._number(index)
    read, where = self._split.read(number, "image", "image_id", *self.KEYS), self._where(number)
    ids = tfds_reader.texts(read.get("image_id", ()), where) or [
      f"{self._split.name}/{self._split.split}/{number}"
    ]
    return {
      "image": read["image"][0],
      "image_id": ids[0],
      self.NAME: self._own(self._entries(read, number), index),
    }

  def entries(self, index):
    """The entries of a record, without its image."""
    return self._own(self._entries_of(self._number(index)), index)

  def _number(self, index):
    return int(index if self._record is None else self._record[index])

  def _own(self, entries, index):
    return entries if self._record is None else [entries[self._entry[index]]]

  def _entries_of(self, number):
    return self._entries(self._split.read(number, *self.KEYS), number)

  def _where(self, number):
    return f"{self._split.name}, split {self._split.split}, record {number}"


class Captions(_Source):
  """A source of images, see caption.py.

  Captions are lower-cased. Counting them reads every record once.
  """

  NAME, KEYS = "captions", ("caption",)

  def __init__(self, data, split):
    super().__init__(
      tfds_reader.Split(
        data,
        split,
        ("image", "caption") if split == "train" else ("image",),
        ("caption", "image_id"),
      )
    )

  def _entries(self, read, number):
    return [
      text.lower() for text in tfds_reader.texts(read.get("caption", ()), self._where(number))
    ]

  captions = _Source.entries

  def counts(self):
    """i64[N]: captions of every image."""
    return np.array([len(self.entries(index)) for index in range(len(self))], np.int64)

  def group(self, index):
    del index  # no set names parts


class Questions(_Source):
  """A source of VQA records, see sources.py."""

  NAME, KEYS = "questions", ("question_id", "question", "answer")

  def __init__(self, data, split):
    keys = ("image", "question", "answer") if split == "train" else ("image", "question")
    super().__init__(
      tfds_reader.Split(data, split, keys, ("answer", "question_id", "image_id")),
      each=data["questions_per_image"] == 1,
    )

  questions = _Source.entries

  def _entries(self, read, number):
    columns, found = (
      (tfds_reader.texts(read.get(key, ()), self._where(number)) for key in self.KEYS),
      {},
    )
    for row, (key, text, answer) in enumerate(itertools.zip_longest(*columns)):
      key = f"{number}-{row}" if key is None else key
      question = found.setdefault(
        key,
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
      question["answers"] += [answer] if answer else []
    return list(found.values())


class Expressions(_Source):
  """A source of referring expressions, see grounding_sources.py.

  An empty box means that it is not known.
  """

  NAME, KEYS = "expressions", ("image", "text", "box", "id")

  def __init__(self, data, split):
    self._training = split == "train"
    keys = ("image", "text", "box") if self._training else ("image", "text")
    super().__init__(
      tfds_reader.Split(data, split, keys, ("box", "id", "image_id")),
      each=data["expressions_per_image"] == 1,
    )

  expressions = _Source.entries

  def _entries(self, read, number):
    where, found = self._where(number), []
    size, texts = _size(read["image"][0]), read["text"]
    shares = np.reshape(read["box"], (-1, 4)) if "box" in read else np.zeros((len(texts), 4))
    if len(shares) != len(texts):
      raise ValueError(f"{where} has {len(shares)} boxes and {len(texts)} texts.")
    for row, said in enumerate(texts):
      box = _corners(shares[row], *size)
      if box is None and self._training:
        raise ValueError(f"{where}: box {row} is empty; a training expression needs one.")
      said = tfds_reader.texts(said if isinstance(said, list) else [said], where)
      ids = read["id"][row] if "id" in read else [f"{number}-{row}-{i}" for i in range(len(said))]
      ids = tfds_reader.texts(ids if isinstance(ids, list) else [ids], where)
      found += [{"id": key, "text": text, "box": box} for key, text in zip(ids, said)]
    return found


def _size(image):
  """(width, height) of an encoded image, by its header.

  One that cannot be read is left to the reader of images.
  """
  try:
    with Image.open(io.BytesIO(image)) as opened:
      return opened.size
  except Exception:  # decoders raise anything on damaged bytes
    return 1, 1


def _corners(box, width, height):
  """BBoxFeature (top, left, bottom, right) as shares -> (x1, y1, x2, y2) in pixels.

  None if it is empty.
  """
  top, left, bottom, right = map(float, box)
  return (
    (left * width, top * height, right * width, bottom * height)
    if bottom > top and right > left
    else None
  )
