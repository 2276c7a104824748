"""TensorFlow Datasets in the layouts of the catalog, read without TensorFlow, and our own sets."""

import itertools
import pathlib
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mplug_jax import data
from mplug_jax.data.errors import RecordError
from mplug_jax.data.images import ops
from mplug_jax.data.sources import caption, grounding, tfds, vqa
from mplug_jax.training import loop
from tests.support import shard_files, tiny_run
from tests.support.tfds_case import (
  FEATURES,
  config,
  image,
  make_coco,
  make_own,
  make_ref_coco,
  prepare,
)
from tools import prepare_data

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
  return make_coco(tmp_path_factory)


@pytest.fixture(scope="module")
def ref_coco(tmp_path_factory):
  return make_ref_coco(tmp_path_factory)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
  return make_own(tmp_path_factory)


# ---- sets of the catalogue


@pytest.mark.parametrize(
  "name", ["coco_captions", "coco_captions/2014", "coco_captions/2014:1.1.0"]
)
def test_coco_captions(coco, name):
  c = config("caption", f"data=tfds:{name},root={coco}")
  train_source, val = (caption.images(c.data, split) for split in ("train", "val"))
  found = {
    record["image_id"]: record for record in map(train_source.__getitem__, range(3))
  }  # TFDS shuffles
  assert {number: len(record["captions"]) for number, record in found.items()} == {
    "2": 2,
    "3": 3,
    "1": 1,
  }
  assert found["2"]["image"] == shard_files.picture(2)
  assert found["2"]["captions"] == [
    "a dog 0 é",
    "a dog 1 é",
  ]
  assert val.captions(0) == [f"a dog {i} é" for i in range(5)]
  assert val.counts().tolist() == [5]
  assert len(data.get_source(config("retrieval", f"data=tfds:{name},root={coco}"), "train")) == 6


def test_ref_coco(ref_coco):
  c = config("grounding", f"data=tfds:ref_coco/refcoco_unc,root={ref_coco},test=testA")
  source = grounding.get(c.data, "train")
  found = sorted(
    (
      (record["image_id"], *record["expressions"])
      for record in map(source.__getitem__, range(len(source)))
    ),
    key=str,
  )
  assert [(number, entry["text"], entry["id"]) for number, entry in found] == [
    ("0", "Box 0, 0", "0"),
    ("0", "Box 0, 1", "1"),
    ("0", "Box 2, 0", "20"),
    ("1", "Box 0, 0", "0"),
  ]
  np.testing.assert_allclose(
    [entry["box"] for _, entry in found[1:3]], [(4, 8, 20, 16), (12, 8, 20, 16)], rtol=1e-6
  )
  assert [len(grounding.get(c.data, split)) for split in ("val", "test")] == [3, 2]
  c.data.expressions_per_image = 4
  assert [len(grounding.get(c.data, "train").expressions(i)) for i in range(3)].count(3) == 1


def test_sets_can_be_sent_and_shared(coco):
  source = caption.images(
    config("caption", f"data=tfds:coco_captions/2014,root={coco}").data, "train"
  )

  def read(source):
    return [source[i] for i in range(len(source))]

  sent, expected = pickle.loads(pickle.dumps(source)), read(source)
  with ThreadPoolExecutor(8) as pool:
    assert all(found == expected for found in pool.map(read, [sent] * 16))


def test_fields_may_be_called_otherwise(tmp_path):
  features = {
    "photo": FEATURES.Image(),
    "texts": {"alt/en": FEATURES.Text()},
    "size": FEATURES.Tensor(shape=(2,), dtype=np.int32),
  }
  example = {"photo": image(1), "texts": {"alt/en": "Some Text"}, "size": [1, 2]}
  folder = prepare(tmp_path, "photos", "", features, {"train": [example], "test": [example]})
  c = config(
    "caption", f"data=tfds:photos,root={folder}", data__fields="image=photo,caption=texts/alt/en"
  )
  source = caption.images(c.data, "train")
  assert source[0] == {
    "image": shard_files.picture(1),
    "image_id": "photos/1.1.0/train/0",
    "captions": ["some text"],
  }
  c.data.fields = "image=photo"
  tiny_run.refused(
    lambda: caption.images(c.data, "train"),
    "photos/1.1.0 has no field 'caption' for our caption; it has photo, size, "
    "texts/alt/en; name it with --config.data.fields=caption=...",
  )
  c.data.fields = "image=size,caption=texts/alt/en"
  tiny_run.refused(
    lambda: caption.images(c.data, "train"), "photos/1.1.0: size is no Image but a Tensor."
  )
  c.data.fields = "image=photo"
  assert caption.images(c.data, "test").captions(0) == []
  c.data.fields = "image=phot"
  tiny_run.refused(
    lambda: caption.images(c.data, "train"), "photos/1.1.0 has no field 'phot' for our image"
  )
  tiny_run.refused(
    lambda: caption.images(c.data, "val"),
    "photos/1.1.0 has no split 'val' for our val; it has",
    "config.data.splits",
  )


def test_sets_that_cannot_be_read(coco, tmp_path):
  def images(name, root):
    return lambda: caption.images(config("caption", f"data=tfds:{name},root={root}").data, "train")

  tiny_run.refused(
    images("coco_captions", tmp_path),
    f"coco_captions is not prepared in {tmp_path}; name the folder with root=",
  )
  for name in ("coco_captions/2017", "coco_captions/2014:9.0.0", "flickr_none"):
    tiny_run.refused(images(name, coco), f"{name} is not prepared in {coco}")
  tiny_run.refused(images("Coco Captions!", coco), "Coco Captions! of TFDS cannot be read: ")
  tiny_run.refused(
    lambda: caption.images(config("caption", "data=tfds").data, "train"),
    "config.data.builder is not set",
  )
  info = pathlib.Path(coco, "coco_captions/2014/1.1.0/dataset_info.json").read_text()
  other = tmp_path / "coco_captions" / "2014" / "1.1.0"
  other.mkdir(parents=True)
  (other / "features.json").write_text(
    pathlib.Path(coco, "coco_captions/2014/1.1.0/features.json").read_text()
  )
  (other / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
  tiny_run.refused(
    images("coco_captions/2014", tmp_path),
    'is prepared as tfrecord; prepare it again with file_format="array_record"',
  )


# ---- our own data


def test_our_own_files_become_sets(own):
  by_id = {}
  for task, name, get in (
    ("caption", "mplug_captions", caption.images),
    ("vqa", "mplug_questions", vqa.get),
    ("grounding", "mplug_boxes", grounding.get),
  ):
    ours, theirs = (
      get(config(task, f"data={arg}").data, "train")
      for arg in (f"jsonl:{own}/train.jsonl", f"tfds:{name},root={own}/tfds")
    )
    assert len(ours) == len(theirs) == (4 if task == "caption" else 5)
    keys = "image_id", theirs.NAME
    by_id[task] = [
      sorted(({key: source[i][key] for key in keys} for i in range(len(source))), key=str)
      for source in (ours, theirs)
    ]
    assert theirs[0]["image"] in [shard_files.picture(i) for i in range(4)]
  for record in itertools.chain(*by_id["vqa"]):
    for question in record["questions"]:
      question |= {"question_id": str(question["question_id"]), "dataset": ""}
  assert by_id["caption"][0] == by_id["caption"][1]
  assert by_id["vqa"][0] == by_id["vqa"][1]
  for ours, theirs in zip(*by_id["grounding"], strict=True):
    (a,), (b,) = ours["expressions"], theirs["expressions"]
    assert (a["text"], a["id"]) == (b["text"], b["id"])
    np.testing.assert_allclose(b["box"], np.minimum(a["box"], (40, 32, 40, 32)), rtol=1e-6)


@pytest.mark.parametrize("box", [(0.5, 0.2, 0.5, 0.9), (0.1, np.nan, 0.5, 0.9)])
def test_an_empty_training_box_is_counted_once_and_named(own, caplog, monkeypatch, box):
  corners = tfds._corners
  monkeypatch.setattr(  # in place of the box of "Part", the only one that ends before the middle
    tfds, "_corners", lambda given, *size: corners(box if given[3] < 0.5 else given, *size)
  )
  c = config("grounding", f"data=tfds:mplug_boxes,root={own}/tfds")
  source = grounding.get(c.data, "train")
  for _ in range(2):
    texts = [e["text"] for i in range(len(source)) for e in source.expressions(i)]
    assert sorted(texts) == [f"Thing {i}" for i in range(4)]
  assert source.bad.count == 1
  (message,) = caplog.messages
  assert "mplug_boxes" in message
  assert "is empty; a training expression needs one. It is left out." in message
  c.data.strict = True
  with pytest.raises(RecordError, match="box . is empty"):
    grounding.get(c.data, "train")


def test_a_set_that_is_there_is_kept(own, capsys):
  assert (
    prepare_data.main(
      ["tfds", "--task=caption", f"--data=jsonl:{own}/train.jsonl", f"--out={own}/tfds"]
    )
    == 1
  )
  assert "mplug_captions/1.0.0 exists; remove it" in capsys.readouterr().err
  assert (
    prepare_data.main(
      ["tfds", "--task=caption", f"--data=jsonl:{own}/none.jsonl", f"--out={own}/new"]
    )
    == 1
  )
  assert "none.jsonl, which does not exist" in capsys.readouterr().err


def test_scenes_become_a_set(tmp_path, monkeypatch):
  from mplug_jax.data.prepare import tfds as tfds_builders
  from mplug_jax.scenes import scene

  monkeypatch.setattr(scene, "SPLITS", {"train": 2, "val": 1, "test": 1})
  c = config("vqa", "data=scenes")
  assert tfds_builders.prepare("vqa", c.data, ["train", "val"], str(tmp_path)) == (
    "mplug_questions",
    {"train": 2, "val": 1},
  )
  theirs = vqa.get(
    config("vqa", f"data=tfds:mplug_questions,root={tmp_path}", data__questions_per_image=8).data,
    "train",
  )
  ours = {
    record["image_id"]: record for record in map(vqa.get(c.data, "train").__getitem__, range(2))
  }
  for record in map(theirs.__getitem__, range(2)):
    assert [(q["question_id"], q["question"], q["answers"]) for q in record["questions"]] == [
      (q["question_id"], q["question"], q["answers"]) for q in ours[record["image_id"]]["questions"]
    ]
    np.testing.assert_array_equal(
      ops.decode_image(record["image"]), ours[record["image_id"]]["image"]
    )


def test_tensorflow_is_not_imported(own):
  code = f"""
import sys
from mplug_jax.data.sources import vqa as sources
data = dict(
  name="tfds",
  builder="mplug_questions",
  data_dir={str(own / "tfds")!r},
  splits=("train", "val", "test"),
  fields="",
  questions_per_image=1,
)
questions = sources.get(data, "train")[0]["questions"]
print(len(questions), sorted({{"tensorflow", "jax"}} & set(sys.modules)))
"""
  result = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=False,
    cwd=tiny_run.ROOT,
    timeout=60,
  )
  assert result.stdout == "1 []\n", result.stderr


@pytest.mark.parametrize(
  ("name", "builder", "metric"),
  [
    pytest.param("grounding", "mplug_boxes", "acc@0.5", marks=pytest.mark.slow),
    pytest.param("vqa", "mplug_questions", "accuracy", marks=pytest.mark.slow),
    pytest.param("caption", "mplug_captions", "CIDEr-D", marks=pytest.mark.slow),
  ],
)
def test_a_run_on_a_set(name, builder, metric, own, tmp_path, capsys):
  c = config(
    name,
    f"data=tfds:{builder},root={own}/tfds",
    model__image_size=32,
    compilation_cache="",
    total_steps=2,
    eval__split="val",
  )
  assert loop.train(c, str(tmp_path)) == 0
  assert capsys.readouterr().out.splitlines()[-1].startswith(f"final: {metric}")
