"""Prepares any source of captioning, VQA or grounding as a TensorFlow Datasets set.

    python -m tools.prepare_data tfds --task=caption --data=jsonl:/my/train.jsonl --out=/my/tfds

Needs no TensorFlow. Without it TFDS writes no sequences in sequences, so the answers to a question
are rows that share its id.
"""

import abc
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from mplug_jax.data.images import ops
from mplug_jax.data.sources import caption, grounding, vqa
from mplug_jax.data.storage import archives

_TEXT = tfds.features.Text
_SEQUENCE = tfds.features.Sequence


class _Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Base of the builders, which write the records of a source for each split."""

  VERSION = tfds.core.Version("1.0.0")
  FEATURES: dict[str, Any] = {}  # beside the image
  # There are no checksums beside the code; TFDS 4.9 looks for them with importlib_resources, which
  # it does not install.
  code_path = None

  def __init__(self, *, records: Mapping[str, Any] | None = None, **options: Any):
    """Makes a builder.

    Args:
      records: {split: source}.
      **options: as of every builder; data=tfds:NAME reads file_format="array_record".
    """
    self._source_of = records or {}
    super().__init__(**options)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "image_id": _TEXT(), **self.FEATURES}
      ),
    )

  def _split_generators(self, dl_manager: Any) -> Any:
    del dl_manager  # nothing is downloaded
    return {split: self._generate_examples(source) for split, source in self._source_of.items()}

  def _generate_examples(self, source: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for number in range(len(source)):
      record = source[number]
      image = _encoded(record["image"])
      fields = {"image": io.BytesIO(image), "image_id": str(record["image_id"])}
      yield number, fields | self.example(record, image)

  @abc.abstractmethod
  def example(self, record: Mapping[str, Any], image: bytes) -> dict[str, Any]:
    """Returns the fields beside the image.

    Args:
      record: a record of the source.
      image: its encoded image.
    """


class MplugCaptions(_Records):
  """Images with captions, from a source of sources/caption.py."""

  FEATURES = {"captions": _SEQUENCE({"text": _TEXT()})}

  def example(self, record: Mapping[str, Any], image: bytes) -> dict[str, Any]:
    """Returns the captions."""
    return {"captions": [{"text": text} for text in record["captions"]]}


class MplugQuestions(_Records):
  """Images with questions, from a source of sources/vqa.py; one row for each answer."""

  FEATURES = {"questions": _SEQUENCE({"id": _TEXT(), "question": _TEXT(), "answer": _TEXT()})}

  def example(self, record: Mapping[str, Any], image: bytes) -> dict[str, Any]:
    """Returns the questions."""
    return {
      "questions": [
        {"id": str(question["question_id"]), "question": question["question"], "answer": answer}
        for question in record["questions"]
        for answer in question["answers"] or [""]
      ]
    }


class MplugBoxes(_Records):
  """Images with phrases and boxes, from a source of sources/grounding.py.

  An unknown box is empty.
  """

  FEATURES = {
    "objects": _SEQUENCE({"id": _TEXT(), "text": _TEXT(), "bbox": tfds.features.BBoxFeature()})
  }

  def example(self, record: Mapping[str, Any], image: bytes) -> dict[str, Any]:
    """Returns the phrases with their boxes."""
    height, width = ops.decode_image(image, str(record["image_id"])).shape[:2]
    return {
      "objects": [
        {
          "id": str(expression.get("id", number)),
          "text": expression["text"],
          "bbox": _relative_box(expression["box"], width, height),
        }
        for number, expression in enumerate(record["expressions"])
      ]
    }


_TASKS = {
  "caption": (MplugCaptions, caption.images),
  "vqa": (MplugQuestions, vqa.get),
  "grounding": (MplugBoxes, grounding.get),
}


def prepare(
  task: str, data: Mapping[str, Any], splits: Sequence[str], folder: str
) -> tuple[str, dict[str, int]]:
  """Prepares the data of a config as array_record.

  Args:
    task: "caption", "vqa" or "grounding".
    data: config.data.
    splits: of "train", "val" and "test".
    folder: the data_dir of TFDS.

  Returns:
    (name of the set, {split: number of examples}).

  Raises:
    ValueError: as in the source; an image cannot be read; the set exists.
    FileNotFoundError: as in the source.
  """
  builder_type, get_source = _TASKS[task]
  builder = builder_type(
    records={split: get_source(data, split) for split in splits},
    data_dir=folder,
    file_format="array_record",
  )
  if builder.is_prepared():
    raise ValueError(f"{builder.data_path} exists; remove it, or choose another folder.")
  builder.download_and_prepare()
  return builder.name, {split: info.num_examples for split, info in builder.info.splits.items()}


def _encoded(image: Any) -> bytes:
  """Returns an image of a source as encoded bytes; raises the error that it may be."""
  if isinstance(image, np.ndarray):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
  if isinstance(image, Exception):
    raise image
  return image if isinstance(image, bytes) else archives.open_bytes(image)


def _relative_box(box: Sequence[float] | None, width: int, height: int) -> tfds.features.BBox:
  """Converts (x1, y1, x2, y2) in pixels, or None, to a box of TFDS."""
  x1, y1, x2, y2 = (0, 0, 0, 0) if box is None else box
  left, top, right, bottom = (
    min(max(share, 0.0), 1.0) for share in (x1 / width, y1 / height, x2 / width, y2 / height)
  )
  return tfds.features.BBox(ymin=top, xmin=left, ymax=bottom, xmax=right)
