"""tools.prepare_data on VQA v2, Visual Genome and GQA, from the distributed files to a run."""

import json

import pytest

from mplug_jax.data.images import ops
from mplug_jax.data.sources import vqa
from tests.support.downloads import (
  configs,
  picture,
  prepare,
  read,
  records,
  run,
  write,
  write_zip,
)
from tests.support.vqa_case import (
  TEN,
  VAL,
)

pytestmark = pytest.mark.usefixtures("one_device")


def test_loose_files(loose):
  printed = prepare("vqa_v2", loose)
  assert printed[:3] == [
    f"wrote {loose}/vqa_train.json: 4 questions",
    f"wrote {loose}/vqa_val.json: 3 questions",
    f"wrote {loose}/answer_list.json: 2 answers",
  ]
  assert printed[-1] == (
    f"train: python -m mplug_jax.main "
    f"--config=configs/vqa.py:base,data=vqa_v2,root={loose},vg=false "
    "--config.tokenizer.path=vocab.txt"
  )
  assert any("Visual Genome is missing" in line for line in printed)
  assert any(
    "test questions (v2_Questions_Test_mscoco.zip) are missing" in line for line in printed
  )
  assert read(loose / "vqa_train.json")[0] == {
    "question_id": 119,
    "question": "Is there a dog 119?",
    "dataset": "vqa",
    "answer": TEN,
    "image": f"{loose}/train2014/COCO_train2014_000000000011.jpg",
  }
  assert read(loose / "answer_list.json") == ["yes", "dog"]  # normalised as the benchmark does
  (c,) = configs(printed)
  train_records, val = records(c, "train", "val")
  assert len(train_records) == 4
  assert [r["questions"][0]["question_id"] for r in val] == VAL[::-1]
  assert ops.decode_image(train_records[0]["image"]).shape == (24, 32, 3)


@pytest.mark.slow
def test_a_run_on_what_was_downloaded(zipped, tmp_path):
  printed = prepare("vqa_v2", zipped)
  assert [line.split(": ")[1] for line in printed[:6]] == [
    "4 questions",
    "3 questions",
    "2 questions",
    "1 questions",
    "2 questions of Visual Genome",
    "2 answers",
  ]
  assert (
    read(zipped / "vqa_train.json")[0]["image"]
    == "train2014.zip/train2014/COCO_train2014_000000000011.jpg"
  )
  assert read(zipped / "vg_qa.json") == [
    {
      "question_id": 986769,
      "question": "What colour is the clock?",
      "image": "images.zip/VG_100K/1.jpg",
      "dataset": "vg",
      "answer": "Green",
    },
    {
      "question_id": 986770,
      "question": "Who is it?",
      "image": "images2.zip/VG_100K_2/2.jpg",
      "dataset": "vg",
      "answer": "a dog",
    },
  ]
  changes = {
    "tokenizer__kind": "wordpiece",
    "tokenizer__path": str(zipped / "vocab.txt"),
    "compilation_cache": "",
    "data__max_question": 12,
    "data__max_answers": 4,
    "data__max_answer_tokens": 5,
    "total_steps": 2,
  }
  (c,) = configs(printed, **changes)
  splits = records(c, "train", "val", "test")
  assert [len(split) for split in splits] == [6, 3, 2]
  assert splits[2][0]["questions"][0]["answers"] == []
  assert splits[0][4]["questions"][0]["weights"] == [0.5]
  assert vqa.answer_list({"name": "vqa_v2", "answer_list": str(zipped / "answer_list.json")}) == [
    "yes",
    "dog",
  ]
  assert run(c, tmp_path / "run").startswith("final: accuracy ")
  assert (
    sorted(
      row["question_id"] for row in json.loads((tmp_path / "run/predictions.json").read_text())
    )
    == VAL
  )


def test_gqa(tmp_path):
  def asked(answer):
    return {
      f"0{n}": {
        "semantic": [{"operation": "select"}],
        "imageId": str(n),
        "question": "Is it a dog?",
        "isBalanced": True,
        "answer": answer,
        "fullAnswer": "Yes.",
      }
      for n in (1, 2)
    }

  write_zip(
    tmp_path / "questions1.2.zip",
    {f"{name}_balanced_questions.json": asked("yes") for name in ("train", "val", "testdev")},
  )
  write(tmp_path, {f"images/{n}.jpg": picture(n) for n in (1, 2)})
  (c,) = configs(prepare("gqa", tmp_path))
  for split in records(c, "train", "val", "test"):
    assert [r["questions"][0]["question_id"] for r in split] == ["01", "02"]
    assert split[0]["questions"][0]["answers"] == ["yes"]
  assert read(tmp_path / "gqa_train.json")[0]["image"] == "1.jpg"
