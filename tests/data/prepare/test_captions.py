"""tools.prepare_data on captions and pre-training sets, from the distributed files to a run."""

import json

import pytest

from mplug_jax.training import evaluate
from tests.support import caption_run
from tests.support.captions_case import WORDS, make_folder, name_of, texts
from tests.support.downloads import (
  configs,
  prepare,
  read,
  records,
  run,
  write,
  write_clips,
)

pytestmark = pytest.mark.usefixtures("drawn_start")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return make_folder(tmp_path_factory)


def settings(folder):
  return {
    "tokenizer__kind": "wordpiece",
    "tokenizer__path": str(folder / "vocab.txt"),
    "compilation_cache": "",
    "total_steps": 2,
    "data__max_caption": 8,
  }


@pytest.fixture(scope="module")
def printed(folder):
  """Output of the tool for COCO, and for Visual Genome."""
  return prepare("coco_captions", folder), prepare("visual_genome", folder)


def test_captioning_coco(folder, printed, tmp_path):
  lines = printed[0]
  assert [line for line in lines if line.startswith("wrote ")] == [
    f"wrote {folder}/{name}"
    for name in (
      "caption_train.json: 3 images",
      "caption_val.json: 1 images",
      "caption_test.json: 1 images",
      "coco_train.json: 6 captions",
      "coco_val.json: 1 images",
      "coco_test.json: 1 images",
    )
  ]
  assert lines[-2:] == [
    f"train: python -m mplug_jax.main --config=configs/{arg},root={folder} "
    f"--config.tokenizer.path=vocab.txt"
    for arg in ("caption.py:base,data=karpathy", "retrieval.py:base,data=coco")
  ]
  assert read(folder / "caption_train.json")[2] == {
    "filename": name_of(2),
    "filepath": "val2014.zip/val2014",
    "cocoid": 9,
    "sentences": [{"raw": text.strip()} for text in texts(2)],
  }
  (config,) = configs(lines[:-1], **caption_run.run_settings(tmp_path))
  assert [len(split) for split in records(config, "train", "val", "test")] == [3, 1, 1]
  assert run(config, tmp_path / "run").startswith("final: CIDEr-D ")
  assert json.loads((tmp_path / "run/predictions.json").read_text())[0]["image_id"] == 11


def test_retrieval_reads_coco(folder, printed):
  assert read(folder / "coco_train.json")[0] == {
    "image": f"train2014.zip/train2014/{name_of(0)}",
    "caption": texts(0)[0].strip(),
    "image_id": "coco_7",
  }
  _, config = configs(printed[0])
  assert [len(split) for split in records(config, "train", "val", "test")] == [6, 2, 2]


def test_pretraining_reads_visual_genome(folder, printed):
  assert printed[1][:2] == [
    f"wrote {folder}/vg.json: 2 images",
    "note: 4 different descriptions of these images; 1 images of COCO's val and test splits were "
    "left out",
  ]
  assert read(folder / "vg.json") == [
    {"image": f"{place}.jpg", "caption": ["a red cat", "the mat"], "image_id": f"vg_{place[-1]}"}
    for place in ("VG_100K/1", "VG_100K_2/2")
  ]
  (config,) = configs(printed[1])
  assert [len(split) for split in records(config, "train", "val", "test")] == [10, 2, 2]


@pytest.mark.slow
def test_runs_of_retrieval_and_pretraining_and_clips(folder, printed, tmp_path):
  """Clips are what a pre-trained model is evaluated on."""
  _, retrieval, pretrain = configs([*printed[0], *printed[1]], **settings(folder))
  assert run(retrieval, tmp_path / "retrieval").startswith("final: r_mean ")
  assert run(pretrain, tmp_path / "pretrain").startswith("final: r_mean ")
  write_clips(tmp_path / "videos", "video7.mp4", "video8.mp4")
  asked = [
    {
      "answer": WORDS[4 + n],
      "category_id": 1,
      "id": n,
      "question": "the cat runs",
      "video_id": 7 + n,
    }
    for n in range(2)
  ]
  write(
    tmp_path,
    {
      "MSRVTT_JSFUSION_test.csv": "key,vid_key,video_id,sentence\nret0,msr7,video7,a "
      "cat\nret1,msr8,video8,a dog\n",
      "train_qa.json": asked,
      "test_qa.json": asked,
      "vatex_public_test_english_v1.1.json": [
        {"videoID": f"video{n}", "enCap": ["A cat.", "it runs"]} for n in (7, 8)
      ],
    },
  )
  for name, metric, changes in (
    ("msrvtt", "r_mean", {}),
    ("msrvtt_qa", "accuracy", {}),
    ("vatex", "CIDEr-D", {"task__max_length": 20}),
  ):
    (c,) = configs(
      prepare(name, tmp_path),
      data__frames=2,
      compilation_cache="",
      model__image_size=32,
      **changes,
    )
    assert metric in evaluate.evaluate(c, str(tmp_path / f"out_{name}"), str(tmp_path / "pretrain"))
