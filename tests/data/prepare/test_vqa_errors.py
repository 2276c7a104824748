"""Errors of the VQA v2 preparation."""

import pytest

from mplug_jax.data import prepare as data_prepare
from tests.support import tiny_run
from tests.support.downloads import (
  configs,
  prepare,
  read,
  records,
  refused,
  write,
)
from tests.support.vqa_case import (
  TEST,
  TRAIN,
  annotations,
  questions,
  vqa_files_of,
)

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
    ("\xff", "is not UTF-8 text (byte 0)."),
    ("\xff\xfe", "is UTF-16 or UTF-32 text; save it as UTF-8."),
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
