"""TFDS data sets written for the tests."""

import contextlib
import importlib
import io
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.features import feature as feature_lib

from tests.support import shard_files
from tools import prepare_data

FEATURES = tfds.features


def config(name, arg, **changes):
  c = importlib.import_module(f"configs.{name}").get_config(f"tiny,{arg}")
  c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return c


class Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A builder of given features and examples, {split: list}."""

  VERSION = tfds.core.Version("1.1.0")
  code_path = None

  def __init__(self, *, features, examples, **options):
    self._given = features, examples
    super().__init__(**options)

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=FEATURES.FeaturesDict(self._given[0]))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(examples) for split, examples in self._given[1].items()}

  def _generate_examples(self, examples):
    yield from enumerate(examples)


def prepare(folder, name, config_name, features, examples, file_format="array_record"):
  """Writes a set called `name`.

  Sequences in sequences as well, which TFDS itself writes with TensorFlow alone.
  """
  configs = [tfds.core.BuilderConfig(name=config_name)] if config_name else []
  kind = type(
    "Foreign", (Foreign,), {"name": name, "BUILDER_CONFIGS": configs}, skip_registration=True
  )
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
    patch.setattr(feature_lib.TensorInfo, "dtype", property(lambda self: self.np_dtype))
    kind(
      features=features, examples=examples, data_dir=str(folder), file_format=file_format
    ).download_and_prepare()
  return str(folder)


def image(number):
  return io.BytesIO(shard_files.picture(number))  # 40 x 32


def make_coco(tmp_path_factory):
  """Makes two train images, one restval, one val and one test image, as coco_captions has them."""
  features = {
    "image": FEATURES.Image(encoding_format="jpeg"),
    "image/filename": FEATURES.Text(),
    "image/id": np.int64,
    "captions": FEATURES.Sequence({"text": np.str_, "id": np.int64}),
    "objects": FEATURES.Sequence(
      {"bbox": FEATURES.BBoxFeature(), "label": FEATURES.ClassLabel(num_classes=80)}
    ),
  }

  def example(number):
    return {
      "image": image(number),
      "image/filename": f"{number}.jpg",
      "image/id": number,
      "captions": [{"text": f"A Dog {i} é", "id": i} for i in range(number)],
      "objects": [],
    }

  examples = {
    "train": [example(2), example(3)],
    "restval": [example(1)],
    "val": [example(5)],
    "test": [example(4)],
  }
  return prepare(tmp_path_factory.mktemp("coco"), "coco_captions", "2014", features, examples)


def make_own(tmp_path_factory):
  """Our own annotation files, and the sets made of them by the command."""
  folder = tmp_path_factory.mktemp("own")
  for number in range(4):
    (folder / f"{number}.jpg").write_bytes(shard_files.picture(number))
  rows = [
    {
      "image": f"{i}.jpg",
      "caption": [f"A {i}", f"Another {i}"][: 1 + i % 2],
      "question": "What is it?",
      "answer": ["a", "b", "a"][: i + 1],
      "text": f"Thing {i}",
      "box": [1, 2, 30, 20 + i],
    }
    for i in range(4)
  ]
  rows.append(rows[0] | {"question": "Why?", "text": "Part", "box": [4, 4, 8, 50]})
  for split in ("train", "val"):
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  for task in ("caption", "vqa", "grounding"):
    with contextlib.redirect_stderr(io.StringIO()):
      assert (
        prepare_data.main(
          ["tfds", f"--task={task}", f"--data=jsonl:{folder}/train.jsonl", f"--out={folder}/tfds"]
        )
        == 0
      )
  return folder


def make_ref_coco(tmp_path_factory):
  """Boxes with several expressions each, and masks, as ref_coco of the catalogue has them."""
  refexp = FEATURES.Sequence({"refexp_id": np.int64, "raw": FEATURES.Text()})
  features = {
    "image": FEATURES.Image(encoding_format="jpeg"),
    "image/id": np.int64,
    "objects": FEATURES.Sequence(
      {
        "id": np.int64,
        "bbox": FEATURES.BBoxFeature(),
        "mask": FEATURES.Image(encoding_format="png"),
        "refexp": refexp,
      }
    ),
  }

  def example(number, counts=(2, 0, 1)):
    rows = [
      {
        "id": i,
        "bbox": FEATURES.BBox(ymin=0.25, xmin=0.1 * (i + 1), ymax=0.5, xmax=0.5),
        "mask": io.BytesIO(b"no image"),
        "refexp": [{"refexp_id": 10 * i + j, "raw": f"Box {i}, {j}"} for j in range(count)],
      }
      for i, count in enumerate(counts)
    ]
    return {"image": image(number), "image/id": number, "objects": rows}

  examples = {
    "train": [example(0), example(1, (1,)), example(2, ())],
    "validation": [example(3)],
    "testA": [example(4, (1, 1))],
  }
  return prepare(tmp_path_factory.mktemp("ref_coco"), "ref_coco", "refcoco_unc", features, examples)
