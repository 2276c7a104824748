"""VQA v2 with Visual Genome's questions, and GQA: the official JSON files of configs/vqa.py."""

from collections import Counter
from typing import Any

from mplug_jax.data.prepare import json_stream, pretrain
from mplug_jax.data.prepare.dataset import Dataset
from mplug_jax.data.prepare.download import Download, Images, Wanted, zipped
from mplug_jax.data.prepare.writer import Entries, Output
from mplug_jax.metrics import vqa_accuracy

ANSWERS = 3128  # candidates, as many as the official list of VQA has


def _question_file(part: str, archive: str) -> Wanted:
  return zipped(
    f"v2_OpenEnded_mscoco_{part}_questions.json",
    f"the {part} questions of VQA v2, Balanced Real Images",
    archive,
  )


def _annotation_file(part: str, archive: str) -> Wanted:
  return zipped(
    f"v2_mscoco_{part}_annotations.json",
    f"the {part} annotations of VQA v2, Balanced Real Images",
    archive,
  )


# Split -> part of COCO 2014 that it is about, files of questions and of annotations.
_PARTS = {
  "train": (
    "train2014",
    _question_file("train2014", "v2_Questions_Train_mscoco.zip"),
    _annotation_file("train2014", "v2_Annotations_Train_mscoco.zip"),
  ),
  "val": (
    "val2014",
    _question_file("val2014", "v2_Questions_Val_mscoco.zip"),
    _annotation_file("val2014", "v2_Annotations_Val_mscoco.zip"),
  ),
}
_TESTS = {
  name: _question_file(part, "v2_Questions_Test_mscoco.zip")
  for name, part in (("test", "test2015"), ("test_dev", "test-dev2015"))
}
_VG = zipped(
  "question_answers.json",
  "the question answers of Visual Genome",
  "question_answers.json.zip",
  folders=("", "vg"),
)

_Questions = dict[int, tuple[int, str]]  # question_id -> (image_id, question)


def vqa_v2(download: Download, out: Output) -> None:
  """Writes VQA v2 and, if downloaded, Visual Genome's questions as more training data.

  Args:
    download: the downloaded files.
    out: where the files are written.

  Raises:
    ValueError, OSError: a file is missing or malformed.
  """
  files = iter(download.require(*(wanted for _, *both in _PARTS.values() for wanted in both)))
  paths = {split: (next(files), next(files)) for split in _PARTS}
  tests = _tests(download, out)
  vg = download.find(_VG)
  entries = {name: out.entries(f"vqa_{name}.json", "questions") for name in (*paths, *tests)}
  vg_entries = out.entries("vg_qa.json", "questions of Visual Genome") if vg else None
  candidates = out.entries("answer_list.json", "answers")
  counts: Counter[str] = Counter()
  for split, (questions_path, annotations_path) in paths.items():
    part = _PARTS[split][0]
    images = _coco(download, out, part)
    counted = counts if split == "train" else None
    _annotated(questions_path, annotations_path, part, images, entries[split], counted)
    images.finish(out)
  images = _coco(download, out, "test2015")
  for name, questions in tests.items():
    for question_id, (image_id, text) in questions.items():
      if image := images(_coco_name("test2015", image_id)):
        entries[name].add(
          {"question_id": question_id, "question": text, "image": image, "dataset": "vqa"}
        )
  images.finish(out)
  for answer, _ in counts.most_common(ANSWERS):
    candidates.add(answer)
  arguments = ["data=vqa_v2", f"root={out.folder}"]
  if vg and vg_entries:
    _visual_genome(download, out, vg, vg_entries)
  else:
    out.note(
      "question_answers.json of Visual Genome is missing, which the paper's recipe also trains on"
    )
    arguments.append("vg=false")
  out.command("vqa", "base", *arguments, mode="train")


def _tests(download: Download, out: Output) -> dict[str, _Questions]:
  """Returns the questions of test and test-dev, which training does not need."""
  tests = {
    name: _read_questions(path, "test2015")
    for name, wanted in _TESTS.items()
    if (path := download.find(wanted))
  }
  images = _coco(download, out, "test2015")
  first_images = [image_id for questions in tests.values() for image_id, _ in _first(questions)]
  if any(images.has(_coco_name("test2015", image_id)) for image_id in first_images):
    return tests
  missing = "test2015 images of COCO"
  if not tests:
    missing = "test questions (v2_Questions_Test_mscoco.zip)"
  out.note(f"the {missing} are missing, so there is no test split")
  return {}


def _first(questions: _Questions) -> list[tuple[int, str]]:
  """Returns the first question, if there is one."""
  return list(questions.values())[:1]


def _coco_name(part: str, image_id: int) -> str:
  return f"COCO_{part}_{image_id:012d}.jpg"


def _coco(download: Download, out: Output, part: str) -> Images:
  """Returns the finder of the images of a part of COCO."""
  return Images(
    download,
    f"the {part} images of COCO",
    (f"coco/{part}", part, f"coco/{part}.zip/{part}", f"{part}.zip/{part}", f"images/{part}"),
    f"{out.folder}/coco",
  )


def _read_questions(path: str, part: str) -> _Questions:
  """Reads a file of questions; raises ValueError, also if it is that of another part."""
  questions: _Questions = {}
  header: dict[str, Any] = {}
  types = {"question_id": int, "image_id": int, "question": str}
  for entry, location in json_stream.entries(path, types, "questions", header):
    if entry["question_id"] in questions:
      raise ValueError(f"{location}: question_id {entry['question_id']} is repeated.")
    questions[entry["question_id"]] = entry["image_id"], entry["question"]
  _check_part(path, header, part)
  return questions


def _check_part(path: str, header: dict[str, Any], part: str) -> None:
  """Raises ValueError if a file names another part of COCO; test-dev is part of the test."""
  named = header.get("data_subtype", part)
  if str(named).replace("test-dev", "test") != part:
    raise ValueError(
      f"{path} has the data_subtype {named}, not {part}; another file has this name."
    )


def _annotated(
  questions_path: str,
  annotations_path: str,
  part: str,
  images: Images,
  entries: Entries,
  counts: Counter[str] | None,
) -> None:
  """Writes a split in the order of its annotations; raises ValueError.

  Args:
    questions_path: file of its questions.
    annotations_path: file of its annotations.
    part: part of COCO that it is about.
    images: finds its images.
    entries: takes its questions.
    counts: counts the most frequent answer to each question, if given.
  """
  questions = _read_questions(questions_path, part)
  header: dict[str, Any] = {}
  remaining = dict.fromkeys(questions)
  types = {"question_id": int, "image_id": int, "answers": list, "multiple_choice_answer": str}
  for entry, location in json_stream.entries(annotations_path, types, "annotations", header):
    number = entry["question_id"]
    if number not in remaining:
      problem = "is annotated twice"
      if number not in questions:
        problem = f"is no question of {questions_path}"
      raise ValueError(f"{location}: question_id {number} {problem}; get both files again.")
    del remaining[number]
    image_id, text = questions[number]
    if entry["image_id"] != image_id:
      raise ValueError(
        f"{location}: question {number} is about image {entry['image_id']} here and about "
        f"{image_id} in {questions_path}."
      )
    image = images(_coco_name(part, image_id))
    if image is None:
      continue
    entries.add(
      {
        "question_id": number,
        "question": text,
        "image": image,
        "dataset": "vqa",
        "answer": _answers(entry, location),
      }
    )
    if counts is not None:
      counts[vqa_accuracy.normalize(entry["multiple_choice_answer"])] += 1
  _check_part(annotations_path, header, part)
  if remaining:
    raise ValueError(
      f"{annotations_path} has no annotation of {len(remaining):,} questions of {questions_path}, "
      f"for instance of {next(iter(remaining))}; get both files again."
    )


def _answers(entry: dict[str, Any], location: str) -> list[str]:
  """Returns the answers of all annotators."""
  if not entry["answers"]:
    raise ValueError(f"{location}: the list of answers is empty; get the file again.")
  for answer in entry["answers"]:
    json_stream.check(answer, {"answer": str}, f"{location}, answers")
  return [answer["answer"] for answer in entry["answers"]]


def _visual_genome(download: Download, out: Output, path: str, entries: Entries) -> None:
  """Writes the questions of Visual Genome."""
  images = pretrain.vg_images(download, f"{out.folder}/vg")
  unanswered = 0
  types = {"qa_id": int, "question": str, "answer": str}
  for image_entry, location in json_stream.entries(path, {"id": int, "qas": list}):
    image = images(f"{image_entry['id']}.jpg")
    for question in image_entry["qas"] if image else ():
      json_stream.check(question, types, f"{location}, qas")
      # Answers are sentences with a full stop, unlike those of VQA.
      if answer := question["answer"].strip().removesuffix("."):
        entries.add(
          {
            "question_id": question["qa_id"],
            "question": question["question"],
            "image": image,
            "dataset": "vg",
            "answer": answer,
          }
        )
      else:
        unanswered += 1
  images.finish(out)
  if unanswered:
    out.note(f"{unanswered:,} questions of Visual Genome without an answer were left out")


def _gqa_file(name: str) -> Wanted:
  folders = (
    "",
    "questions/",
    "questions1.2/",
    "questions1.2.zip/",
    "questions1.2.zip/questions1.2/",
  )
  names = tuple(f"{folder}{name}_balanced_questions.json" for folder in folders)
  return Wanted(f"the questions of GQA, version 1.2: {name}_balanced_questions.json", names)


# The test split is test-dev, which has answers.
_GQA = {"train": _gqa_file("train"), "val": _gqa_file("val"), "test": _gqa_file("testdev")}


def gqa(download: Download, out: Output) -> None:
  """Writes GQA's balanced questions.

  Args:
    download: the downloaded files.
    out: where the files are written.

  Raises:
    ValueError, OSError: a file is missing or malformed.
  """
  paths = dict(zip(_GQA, download.require(*_GQA.values())))
  entries = {split: out.entries(f"gqa_{split}.json", "questions") for split in paths}
  images = Images(
    download, "the images of GQA", ("images", "gqa", "images.zip/images"), f"{out.folder}/images"
  )
  types = {"imageId": str, "question": str, "answer": str}
  for split, path in paths.items():
    for number, entry, _ in json_stream.members(path, types):
      if image := images(f"{entry['imageId']}.jpg"):
        entries[split].add(
          {
            "question_id": number,
            "question": entry["question"],
            "image": image,
            "dataset": "gqa",
            "answer": entry["answer"],
          }
        )
  images.finish(out)
  out.command("vqa", "base", "data=gqa", f"root={out.folder}", mode="train")


VQA_V2 = Dataset("VQA v2, with Visual Genome's questions if they were downloaded.", vqa_v2)
GQA = Dataset("GQA's balanced questions; the test split is test-dev.", gqa)
