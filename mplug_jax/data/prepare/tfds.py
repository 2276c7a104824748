"""Our own data as sets of TensorFlow Datasets: any source of captioning, VQA or grounding, prepared without TensorFlow.

    python -m tools.prepare_data tfds --task=caption --data=jsonl:/my/train.jsonl --out=/my/tfds

TFDS writes sequences in sequences only with TensorFlow, so the answers to a question are rows that
share its id.
"""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from mplug_jax.data.images import ops
from mplug_jax.data.sources import caption, grounding, vqa
from mplug_jax.data.storage import archives

_TEXT, _SEQUENCE = tfds.features.Text, tfds.features.Sequence


class _Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """What the builders share.

  Args:
    records: {split: source}. The rest: as of every builder; file_format="array_record" is what
      data=tfds:NAME reads.
  """

  VERSION = tfds.core.Version("1.0.0")
  FEATURES = {}  # beside the image
  # there are no checksums beside the code; TFDS 4.9 looks with importlib_resources, which it does
  # not install
  code_path = None

  def __init__(self, *, records=None, **options):
    self._source_of = records or {}
    super().__init__(**options)

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "image_id": _TEXT(), **self.FEATURES}
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    return {split: self._generate_examples(source) for split, source in self._source_of.items()}

  def _generate_examples(self, source):
    for number in range(len(source)):
      record = source[number]
      image = _encoded(record["image"])
      yield (
        number,
        {
          "image": io.BytesIO(image),
          "image_id": str(record["image_id"]),
          **self.example(record, image),
        },
      )

  def example(self, record, image):
    """The fields beside the image. record: of the source. image: encoded."""
    raise NotImplementedError


class MplugCaptions(_Records):
  """Images with captions, of a source as in caption.py."""

  FEATURES = {"captions": _SEQUENCE({"text": _TEXT()})}

  def example(self, record, image):
    return {"captions": [{"text": text} for text in record["captions"]]}


class MplugQuestions(_Records):
  """Images with questions and answers, of a source as in sources.py; a row for every answer."""

  FEATURES = {"questions": _SEQUENCE({"id": _TEXT(), "question": _TEXT(), "answer": _TEXT()})}

  def example(self, record, image):
    return {
      "questions": [
        {"id": str(question["question_id"]), "question": question["question"], "answer": answer}
        for question in record["questions"]
        for answer in question["answers"] or [""]
      ]
    }


class MplugBoxes(_Records):
  """Images with phrases and boxes, of a source as in grounding_sources.py.

  A box that is not known is empty.
  """

  FEATURES = {
    "objects": _SEQUENCE({"id": _TEXT(), "text": _TEXT(), "bbox": tfds.features.BBoxFeature()})
  }

  def example(self, record, image):
    height, width = ops.decode_image(image, str(record["image_id"])).shape[:2]
    return {
      "objects": [
        {
          "id": str(found.get("id", number)),
          "text": found["text"],
          "bbox": _shares(found["box"], width, height),
        }
        for number, found in enumerate(record["expressions"])
      ]
    }


_TASKS = {
  "caption": (MplugCaptions, caption.images),
  "vqa": (MplugQuestions, vqa.get),
  "grounding": (MplugBoxes, grounding.get),
}
TASKS = tuple(_TASKS)


def prepare(task, data, splits, folder):
  """Prepares config.data of a task as array_record in `folder`, the data_dir of TFDS.

  Args:
    task: one of TASKS. splits: of "train", "val" and "test".

  Returns:
    (name of the set, {split: number of examples}).

  Raises:
    ValueError, FileNotFoundError: what the source raises; an image that cannot be read; the set is
      there already.
  """
  kind, get = _TASKS[task]
  builder = kind(
    records={split: get(data, split) for split in splits},
    data_dir=folder,
    file_format="array_record",
  )
  if builder.is_prepared():
    raise ValueError(f"{builder.data_path} is there already; remove it, or choose another folder.")
  builder.download_and_prepare()
  return builder.name, {split: info.num_examples for split, info in builder.info.splits.items()}


def _encoded(image):
  """An image as sources have it -> encoded bytes."""
  if isinstance(image, np.ndarray):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
  if isinstance(image, Exception):
    raise image
  return image if isinstance(image, bytes) else archives.open_bytes(image)


def _shares(box, width, height):
  """(x1, y1, x2, y2) in pixels, or None -> BBox."""
  x1, y1, x2, y2 = (0, 0, 0, 0) if box is None else box
  clip = lambda value: min(max(value, 0.0), 1.0)  # noqa: E731
  return tfds.features.BBox(
    ymin=clip(y1 / height), xmin=clip(x1 / width), ymax=clip(y2 / height), xmax=clip(x2 / width)
  )
