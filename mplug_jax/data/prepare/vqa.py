"""Question answering: VQA v2, with Visual Genome as more training data, and GQA -> the official json files of configs/vqa.py."""

from collections import Counter

from mplug_jax.data.prepare import json_stream, pretrain
from mplug_jax.data.prepare.download import Images, Wanted, zipped
from mplug_jax.metrics import vqa_accuracy

ANSWERS = 3128  # candidates, as many as the official list of VQA has


def _questions(part, archive):
  return zipped(
    f"v2_OpenEnded_mscoco_{part}_questions.json",
    f"the {part} questions of VQA v2, Balanced Real Images",
    archive,
  )


def _annotations(part, archive):
  return zipped(
    f"v2_mscoco_{part}_annotations.json",
    f"the {part} annotations of VQA v2, Balanced Real Images",
    archive,
  )


_PARTS = {  # of a split: the COCO images that it is about, its files
  "train": (
    "train2014",
    _questions("train2014", "v2_Questions_Train_mscoco.zip"),
    _annotations("train2014", "v2_Annotations_Train_mscoco.zip"),
  ),
  "val": (
    "val2014",
    _questions("val2014", "v2_Questions_Val_mscoco.zip"),
    _annotations("val2014", "v2_Annotations_Val_mscoco.zip"),
  ),
}
_TESTS = {
  name: _questions(part, "v2_Questions_Test_mscoco.zip")
  for name, part in (("test", "test2015"), ("test_dev", "test-dev2015"))
}
_VG = zipped(
  "question_answers.json",
  "the question answers of Visual Genome",
  "question_answers.json.zip",
  folders=("", "vg"),
)


def vqa_v2(download, out):
  """VQA v2 and, where it is there, the questions of Visual Genome as more training data."""
  found = iter(download.require(*(wanted for _, *files in _PARTS.values() for wanted in files)))
  paths = {split: (next(found), next(found)) for split in _PARTS}
  tests = _tests(download, out)
  vg = download.find(_VG)
  entries = {name: out.entries(f"vqa_{name}.json", "questions") for name in (*paths, *tests)}
  vg_entries = out.entries("vg_qa.json", "questions of Visual Genome") if vg else None
  candidates = out.entries("answer_list.json", "answers")
  counts = Counter()
  for split, (questions, annotations) in paths.items():
    part = _PARTS[split][0]
    _annotated(
      questions,
      annotations,
      part,
      _coco(download, out, part),
      out,
      entries[split],
      counts if split == "train" else None,
    )
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
  if vg:
    _visual_genome(download, out, vg, vg_entries)
  else:
    out.note(
      "question_answers.json of Visual Genome is not there, which the paper's recipe trains on as "
      "well"
    )
  out.command(
    "vqa", "base", "data=vqa_v2", f"root={out.folder}", *(() if vg else ("vg=false",)), mode="train"
  )


def _tests(download, out):
  """{name: questions} of test and test-dev, neither of which training needs."""
  tests = {
    name: _read_questions(path, "test2015")
    for name, wanted in _TESTS.items()
    if (path := download.find(wanted))
  }
  images = _coco(download, out, "test2015")
  if any(
    images.has(_coco_name("test2015", image_id))
    for questions in tests.values()
    for image_id, _ in [*questions.values()][:1]
  ):
    return tests
  out.note(
    f"the "
    f"{'test2015 images of COCO' if tests else 'test questions (v2_Questions_Test_mscoco.zip)'} "
    f"are not there, so there is no "
    "test split"
  )
  return {}


def _coco_name(part, image_id):
  return f"COCO_{part}_{image_id:012d}.jpg"


def _coco(download, out, part):
  return Images(
    download,
    f"the {part} images of COCO",
    (f"coco/{part}", part, f"coco/{part}.zip/{part}", f"{part}.zip/{part}", f"images/{part}"),
    f"{out.folder}/coco",
  )


def _read_questions(path, part):
  """A file of questions -> {question_id: (image_id, question)}. Raises ValueError, also if it is that of another part."""
  found, said = {}, {}
  for entry, where in json_stream.entries(
    path, {"question_id": int, "image_id": int, "question": str}, "questions", said
  ):
    if entry["question_id"] in found:
      raise ValueError(f"{where}: question_id {entry['question_id']} stands there twice.")
    found[entry["question_id"]] = entry["image_id"], entry["question"]
  _check_part(path, said, part)
  return found


def _check_part(path, said, part):
  if (
    str(said.get("data_subtype", part)).replace("test-dev", "test") != part
  ):  # test-dev is a part of test
    raise ValueError(
      f"{path} says of itself that it is about {said['data_subtype']}, not {part}; the wrong file "
      f"has this name."
    )


def _annotated(questions_path, annotations_path, part, images, out, entries, counts):
  """One split, in the order of its annotations.

  Counts: Counter that takes the answers that most people gave, or None.
  """
  questions, said = _read_questions(questions_path, part), {}
  left = dict.fromkeys(questions)
  types = {"question_id": int, "image_id": int, "answers": list, "multiple_choice_answer": str}
  for entry, where in json_stream.entries(annotations_path, types, "annotations", said):
    number = entry["question_id"]
    if number not in left:
      problem = (
        "is annotated twice" if number in questions else f"is no question of {questions_path}"
      )
      raise ValueError(f"{where}: question_id {number} {problem}; get both files again.")
    del left[number]
    image_id, text = questions[number]
    if entry["image_id"] != image_id:
      raise ValueError(
        f"{where}: question {number} is about image {entry['image_id']} here and about {image_id} "
        f"in {questions_path}."
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
        "answer": _answers(entry, where),
      }
    )
    if counts is not None:
      counts[vqa_accuracy.normalise(entry["multiple_choice_answer"])] += 1
  _check_part(annotations_path, said, part)
  if left:
    raise ValueError(
      f"{annotations_path} has no annotation of {len(left):,} questions of {questions_path}, for "
      f"instance of "
      f"{next(iter(left))}; get both files again."
    )
  images.finish(out)


def _answers(entry, where):
  """The answers of all annotators."""
  if not entry["answers"]:
    raise ValueError(f"{where}: the list of answers is empty; get the file again.")
  for answer in entry["answers"]:
    json_stream.check(answer, {"answer": str}, f"{where}, answers")
  return [answer["answer"] for answer in entry["answers"]]


def _visual_genome(download, out, path, entries):
  images = pretrain.vg_images(download, f"{out.folder}/vg")
  for image_entry, where in json_stream.entries(path, {"id": int, "qas": list}):
    image = images(f"{image_entry['id']}.jpg")
    for question in image_entry["qas"] if image else ():
      json_stream.check(question, {"qa_id": int, "question": str, "answer": str}, f"{where}, qas")
      # Answers are sentences there, with a full stop, and those of VQA are not.
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
  images.finish(out)


def _gqa_file(name):
  places = (
    "",
    "questions/",
    "questions1.2/",
    "questions1.2.zip/",
    "questions1.2.zip/questions1.2/",
  )
  return Wanted(
    f"the questions of GQA, version 1.2: {name}", tuple(place + name for place in places)
  )


_GQA = {
  split: _gqa_file(f"{name}_balanced_questions.json")
  for split, name in (("train", "train"), ("val", "val"), ("test", "testdev"))
}


def gqa(download, out):
  """GQA's balanced questions; its test-dev, which has answers, is the test split."""
  paths = dict(zip(_GQA, download.require(*_GQA.values())))
  entries = {split: out.entries(f"gqa_{split}.json", "questions") for split in paths}
  images = Images(
    download, "the images of GQA", ("images", "gqa", "images.zip/images"), f"{out.folder}/images"
  )
  for split, path in paths.items():
    for number, entry, _ in json_stream.members(
      path, {"imageId": str, "question": str, "answer": str}
    ):
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
