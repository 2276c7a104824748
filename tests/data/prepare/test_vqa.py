"""tools.prepare_data on VQA v2, Visual Genome and GQA, from the distributed files to a run."""

import json

import pytest

from mplug_jax.data import prepare as data_prepare
from mplug_jax.data.images import ops
from mplug_jax.data.sources import vqa
from tests.support import downloads, tiny_run, vqa_files
from tests.support.downloads import (
  configs,
  picture,
  prepare,
  read,
  records,
  refused,
  run,
  write,
  write_zip,
)

TEN = ["yes"] * 6 + ["no"] * 3 + ["a dog"]


def questions(part, ids):
  return {
    "info": {"version": "2.0"},
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "license": {},
    "data_subtype": part,
    "questions": [
      {"image_id": i // 10, "question": f"Is there a dog {i}?", "question_id": i} for i in ids
    ],
  }


def annotations(part, ids):
  answers = [
    {"answer": answer, "answer_confidence": "yes", "answer_id": n}
    for n, answer in enumerate(TEN, 1)
  ]
  return {
    "info": {},
    "license": {},
    "data_subtype": part,
    "annotations": [
      {
        "question_type": "is there a",
        "multiple_choice_answer": "Yes" if i % 2 else "a dog",
        "answers": answers,
        "image_id": i // 10,
        "answer_type": "yes/no",
        "question_id": i,
      }
      for i in ids
    ],
  }


def vqa_files_of(part, ids, said=True):
  files = {f"v2_OpenEnded_mscoco_{part}_questions.json": questions(part, ids)}
  return files | (
    {f"v2_mscoco_{part}_annotations.json": annotations(part, ids[::-1])} if said else {}
  )


def images(part, numbers, prefix=""):
  return {f"{prefix}COCO_{part}_{n:012d}.jpg": picture(n) for n in numbers}


TRAIN, VAL, TEST = [90, 91, 100, 119], [420, 421, 430], [1230, 1240]


@pytest.fixture
def loose(tmp_path):
  """Everything unpacked, images beside the annotations, no Visual Genome and no test questions."""
  write(
    tmp_path,
    {
      **vqa_files_of("train2014", TRAIN),
      **vqa_files_of("val2014", VAL),
      **images("train2014", (9, 10, 11), "train2014/"),
      **images("val2014", (42, 43), "val2014/"),
    },
  )
  return tmp_path


@pytest.fixture(scope="module")
def zipped(tmp_path_factory):
  """As downloaded, nothing unpacked, with test questions and Visual Genome."""
  folder = tmp_path_factory.mktemp("vqa")
  for part, ids in (("train2014", TRAIN), ("val2014", VAL)):
    asked, said = vqa_files_of(part, ids).items()
    write_zip(
      folder / f"v2_Questions_{part.removesuffix('2014').title()}_mscoco.zip", dict([asked])
    )
    write_zip(
      folder / f"v2_Annotations_{part.removesuffix('2014').title()}_mscoco.zip", dict([said])
    )
  write_zip(
    folder / "v2_Questions_Test_mscoco.zip",
    {**vqa_files_of("test2015", TEST, False), **vqa_files_of("test-dev2015", TEST[1:], False)},
  )
  for part, numbers in (
    ("train2014", (9, 10, 11)),
    ("val2014", (42, 43)),
    ("test2015", (123, 124)),
  ):
    write_zip(folder / "coco" / f"{part}.zip", images(part, numbers, f"{part}/"))
  write_zip(
    folder / "question_answers.json.zip",
    {
      "question_answers.json": [
        {
          "id": 1,
          "qas": [
            {
              "a_objects": [],
              "question": "What colour is the clock?",
              "image_id": 1,
              "qa_id": 986769,
              "answer": "Green.",
              "q_objects": [],
            }
          ],
        },
        {
          "id": 2,
          "qas": [
            {"question": "Who is it?", "image_id": 2, "qa_id": 986770, "answer": "a dog"},
            {"question": "Why?", "image_id": 2, "qa_id": 986771, "answer": " ."},
          ],
        },
        {"id": 3, "qas": []},
      ]
    },
  )
  write_zip(folder / "vg" / "images.zip", {f"VG_100K/{n}.jpg": picture(n) for n in (1, 3)})
  write_zip(folder / "vg" / "images2.zip", {"VG_100K_2/2.jpg": picture(2)})
  write(folder, {"vocab.txt": "\n".join([*downloads.SPECIAL, *vqa_files.WORDS]) + "\n"})
  return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  with vqa_files.quick_runs(tmp_path_factory.getbasetemp() / "compiled_prepare_vqa") as folder:
    yield folder


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
def test_a_run_on_what_was_downloaded(zipped, cache, tmp_path):
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
    "compilation_cache": str(cache),
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


# ---- refusals


def test_missing_downloads_are_named(loose):
  write(loose, vqa_files_of("test2015", TEST, False))
  assert any(
    "the test2015 images of COCO are missing, so there is no test split" in line
    for line in prepare("vqa_v2", loose)
  )
  (loose / "v2_mscoco_val2014_annotations.json").unlink()
  refused(
    "vqa_v2",
    loose,
    f"{loose} lacks v2_mscoco_val2014_annotations.json or v2_Annotations_Val_mscoco.zip/",
    "(the val2014 annotations of VQA v2, Balanced Real Images)",
  )
  refused(
    "vqa_v2",
    loose / "train2014",
    "v2_OpenEnded_mscoco_train2014_questions.json",
    "v2_mscoco_val2014_annotations.json",
  )
  refused("gqa", loose, "train_balanced_questions.json", "the questions of GQA, version 1.2")
  refused(
    "vqa_v2",
    loose / "none",
    "none does not exist or is not a folder; --root must be the folder of the downloaded files.",
  )


def test_questions_and_annotations_must_belong_together(loose):
  asked, said = (
    loose / f"v2_{name}.json"
    for name in ("OpenEnded_mscoco_train2014_questions", "mscoco_train2014_annotations")
  )
  write(loose, {said.name: annotations("train2014", [90, 91, 100, 118])})
  refused(
    "vqa_v2",
    loose,
    f"{said}, annotations, entry 4: question_id 118 is no question of {asked}; get both files "
    f"again.",
  )
  write(loose, {said.name: annotations("train2014", [90, 91])})
  refused(
    "vqa_v2", loose, f"{said} has no annotation of 2 questions of {asked}, for instance of 100;"
  )
  write(loose, {said.name: annotations("train2014", [90, 90])})
  refused("vqa_v2", loose, f"{said}, annotations, entry 2: question_id 90 is annotated twice")
  write(loose, {said.name: annotations("val2014", TRAIN)})
  refused("vqa_v2", loose, f"{said} has the data_subtype val2014, not train2014")
  changed = annotations("train2014", TRAIN)
  changed["annotations"][1]["image_id"] = 12
  write(loose, {said.name: changed})
  refused("vqa_v2", loose, "entry 2: question 91 is about image 12 here and about 9 in")
  changed["annotations"][1].update(image_id=9, answers=[])
  write(loose, {said.name: changed})
  refused("vqa_v2", loose, "entry 2: the list of answers is empty")
  changed["annotations"][1]["answers"] = [{"answer": 3}]
  write(loose, {said.name: changed})
  refused("vqa_v2", loose, "entry 2, answers: answer must be a string")
  write(loose, {asked.name: questions("train2014", [90, 90])})
  refused("vqa_v2", loose, f"{asked}, questions, entry 2: question_id 90 is repeated")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (
      '{"questions": [{"question_id": 1, "image_id": 2, "question": "So?"}',
      "character 68: not valid JSON (the file is cut off)",
    ),
    (
      '{"questions": [{"question_id": 1, "image_id": 2, "question": "So',
      "not valid JSON (Unterminated string starting at)",
    ),
    ('{"questions": [{"question_id": 1}]}', "questions, entry 1: key 'image_id' is missing."),
    (
      '{"questions": [{"question_id": "1", "image_id": 2, "question": ""}]}',
      "entry 1: question_id must be a whole number.",
    ),
    (
      '{"questions": [3]}',
      "questions, entry 1: must be an object with question_id, image_id, question, not a int.",
    ),
    ('{"questions": {}}', "character 15: not valid JSON ([ should be here)"),
    ('{"questions": []} {}', "not valid JSON (there is more after the end)"),
    ('{"info": {}, 3: []}', "not valid JSON (a name in quotation marks should be here)"),
    ('{"annotations": [1, 2]}', "key 'questions' is missing."),
    ("\xff\xfe", "is not UTF-8 text."),
    ("<html>", "character 1: not valid JSON ({ should be here)"),
  ],
)
def test_damaged_files(loose, text, message):
  name = "v2_OpenEnded_mscoco_val2014_questions.json"
  (loose / name).write_bytes(text.encode("latin-1"))
  refused("vqa_v2", loose, f"{loose}/{name}", message)


def test_damaged_zip(zipped, tmp_path):
  data = (zipped / "v2_Questions_Train_mscoco.zip").read_bytes()
  (tmp_path / "v2_Questions_Train_mscoco.zip").write_bytes(data[:-40])
  refused("vqa_v2", tmp_path, "v2_Questions_Train_mscoco.zip is not a zip file, or is cut off")


def test_missing_images(loose, tmp_path_factory):
  (loose / "train2014/COCO_train2014_000000000009.jpg").unlink()
  refused(
    "vqa_v2",
    loose,
    f"{loose}: 1 of the train2014 images of COCO are missing, for instance "
    "COCO_train2014_000000000009.jpg; complete the download, or pass --skip_missing to drop "
    "annotations of missing images.",
  )
  out = tmp_path_factory.mktemp("out") / "new" / "folder"
  printed = prepare("vqa_v2", loose, "--skip_missing", f"--out={out}")
  assert any(
    "1 of the train2014 images of COCO are missing, for instance COCO_train2014_000000000009.jpg"
    in line
    for line in printed
  )
  assert [row["question_id"] for row in read(out / "vqa_train.json")] == [119, 100]
  (c,) = configs(printed)
  assert [len(split) for split in records(c, "train", "val")] == [2, 3]
  for path in (loose / "train2014").iterdir():
    path.unlink()
  refused(
    "vqa_v2",
    loose,
    "COCO_train2014_000000000011.jpg is not in coco/train2014 or train2014 or ",
    "(the train2014 images of COCO)",
  )
  refused(
    "vqa_v2", loose, "3 of the train2014 images of COCO are missing", options=["--skip_missing"]
  )


def test_files_that_exist_stay(loose):
  prepare("vqa_v2", loose)
  refused(
    "vqa_v2",
    loose,
    f"{loose}/vqa_train.json exists; remove it, replace it with --overwrite, or choose another "
    "folder with --out.",
  )
  write(loose, vqa_files_of("train2014", TRAIN[:2]))
  prepare("vqa_v2", loose, "--overwrite")
  assert len(read(loose / "vqa_train.json")) == 2


def test_a_folder_with_a_comma(tmp_path):
  (tmp_path / "a,b").mkdir()
  refused(
    "vqa_v2",
    tmp_path / "a,b",
    "a,b has a comma in its name, which ends an argument of a config;",
  )


def test_every_set_is_documented():
  text = (tiny_run.ROOT / "docs" / "data.md").read_text()
  assert [name for name in data_prepare.DATASETS if f"`{name}`" not in text] == []


def test_a_refusal_leaves_no_folder(loose, tmp_path_factory):
  (loose / "v2_mscoco_val2014_annotations.json").write_text("{}")
  out = tmp_path_factory.mktemp("out")
  refused("vqa_v2", loose, "key 'annotations' is missing.", options=[f"--out={out}/a/b"])
  assert list(out.iterdir()) == []
