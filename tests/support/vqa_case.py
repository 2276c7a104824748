"""Downloads of VQA v2 for the tests."""

from tests.support import vqa_files, word_list
from tests.support.downloads import (
  picture,
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


def make_zipped(tmp_path_factory):
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
  write(folder, {"vocab.txt": word_list.text(*vqa_files.WORDS)})
  return folder


def make_loose(tmp_path):
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
