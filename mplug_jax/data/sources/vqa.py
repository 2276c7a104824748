"""Sources of VQA records, by name.

A source has `len(source)`, `source[i]` (a record) and, where pixels cost time,
`source.questions(i)` (the questions of record i alone). A record is

    {"image": path | encoded bytes | u8[H, W, 3], "image_id": str, "questions": [question, ...]}

and a question {"question_id": int | str, "question": str, "answers": list[str] (of every annotator,
or the keys of soft labels; empty when unknown), "weights": None (each answer weighs as often as it
was given) or one float per unique answer in order of appearance, "ocr": str, "objects": str,
"dataset": str}. Messages count entries of files from 1.
"""

import importlib.util
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mplug_jax.data.errors import BadRecords, RecordError
from mplug_jax.data.sources.entry_errors import EntryErrors
from mplug_jax.data.sources.entry_ids import EntryIds
from mplug_jax.data.sources.source import Record, Source
from mplug_jax.data.storage import annotations, image_paths, json_values, packed
from mplug_jax.metrics.ids import canonical

_ROOT_KEYS = {"vqa": "vqa_root", "vg": "vg_root", "gqa": "gqa_root"}
# Their questions have one answer, without votes; the official fine-tuning halves its weight.
_SINGLE_ANSWER_WEIGHT = {"vg": 0.5, "gqa": 0.5}
_QUESTION_KEYS = ("question_id", "question", "answers", "weights", "ocr", "objects", "dataset")


class VqaRecords:
  """A sequence of VQA records as a source."""

  def __init__(self, records: Sequence[Record]):
    self._records = records

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Record:
    return self._records[index]

  def questions(self, index: int) -> list[Record]:
    """Returns the questions of a record."""
    return self._records[index]["questions"]


def get(data: Mapping[str, Any], split: str) -> Source:
  """Returns the source that `data.name` names.

  The sources, rows of SOURCES, read these keys of config.data:

  - easy_vqa: val_every (0: no validation split; n: images of the training set whose number n
    divides are split "val" and not in "train").
  - vqa_v2, gqa: train_files (list), val_file, test_file in the official JSON format, label_file
    (soft labels of val_file, optional), vqa_root, vg_root, gqa_root (folders of images, each needed
    only if the files name that data set, docs/official.md item 21), questions_per_image.
  - jsonl: train_files, val_file, test_file in any format of annotations.entries, an object a line
    or row: image, question, answer (a string or the list of all annotators' answers), and
    optionally question_id, ocr, object_label; image_root, questions_per_image.
  - video_qa: train_files, val_file, test_file with one object a line, as MSR-VTT and MSVD have
    them: video_id, question, answer, optionally question_id; video_root, video_suffix (".mp4"). Its
    "images" are clips, see data.frames.
  - tfds: builder, data_dir, splits, fields, questions_per_image; see tfds.py.
  - scenes, clips: size, seed, difficulty of scenes.scene.SceneConfig; images, or clips of
    data.frames.

  All sources of files also read fields, see annotations.Fields.

  Args:
    data: config.data, a mapping with `name` and the keys of that source.
    split: "train", "val" or "test". Only "train" requires answers.

  Returns:
    A source; questions of one image make one record if questions_per_image > 1 (always for
    easy_vqa), otherwise every question is a record.

  Raises:
    ValueError: unknown name or split, unset key, malformed file (names file and entry).
    FileNotFoundError: a file, one of the first images or the package is missing.
  """
  if data["name"] not in SOURCES:
    raise ValueError(f"data.name is {data['name']!r}; known sources: {', '.join(SOURCES)}.")
  if split not in ("train", "val", "test"):
    raise ValueError(f"Split {split!r} does not exist; known splits: train, val, test.")
  return SOURCES[data["name"]](data, split)


def questions_of(source: Source, index: int) -> list[Record]:
  """Returns the questions of a record, without making its image if the source can.

  Args:
    source: a source of VQA records.
    index: the record.
  """
  questions = getattr(source, "questions", None)
  return questions(index) if questions else source[index]["questions"]


def texts(source: Source, records: int = 0) -> Iterator[str]:
  """Yields questions, each followed by its unique answers, to fit a tokenizer to.

  Args:
    source: a source of VQA records.
    records: number of records to read, evenly spaced; 0: all.
  """
  for index in range(0, len(source), max(1, len(source) // records) if records else 1):
    for question in questions_of(source, index):
      yield question["question"]
      yield from dict.fromkeys(question["answers"])


def answer_list(data: Mapping[str, Any]) -> list[str]:
  """Returns the candidate answers for ranking, from the JSON list `data.answer_list`.

  Args:
    data: config.data.

  Raises:
    ValueError: the key is unset, or the file is empty or neither a JSON list of strings nor an
      object, whose keys are the answers.
    FileNotFoundError: the file does not exist.
  """
  path = annotations.configured_file(data, "answer_list")
  answers = annotations.read_json(path, json_values.Checks(data.get("strict", False)))
  answers = list(answers) if isinstance(answers, dict) else answers
  if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
    raise ValueError(f"{path} must be a json list of strings, the candidate answers.")
  if not answers:
    raise ValueError(f"{path} is an empty list; it should hold the candidate answers.")
  return answers


def _easy_vqa(data: Mapping[str, Any], split: str) -> VqaRecords:
  """Reads the PyPI package easy-vqa; a question's id is its row in questions.json."""
  spec = importlib.util.find_spec("easy_vqa")
  if spec is None or not spec.submodule_search_locations:
    raise FileNotFoundError("data.name easy_vqa needs the package easy-vqa: pip install easy-vqa.")
  val_every = data.get("val_every", 0)
  if split == "val" and not val_every:
    raise ValueError(
      "easy_vqa has no validation split of its own; set data.val_every, for "
      "instance to 20, to hold out every 20th training image."
    )
  subfolder = "test" if split == "test" else "train"
  folder = pathlib.Path(spec.submodule_search_locations[0], "data", subfolder)
  records: dict[int, Record] = {}
  for row, (text, answer, number) in enumerate(annotations.read_json(folder / "questions.json")):
    held_out = bool(val_every) and number % val_every == 0
    if split != "test" and held_out != (split == "val"):
      continue
    record = records.get(number)
    if record is None:
      image = str(folder / "images" / f"{number}.png")
      record = records[number] = {"image": image, "image_id": str(number), "questions": []}
    record["questions"].append(_question(row, text, [answer], "easy_vqa"))
  return VqaRecords([records[number] for number in sorted(records)])


def _scenes(data: Mapping[str, Any], split: str) -> Source:
  from mplug_jax.scenes import questions as scene_questions
  from mplug_jax.scenes import scene

  config = scene.SceneConfig(
    data.get("size"), data.get("seed", 0), data.get("difficulty", "default")
  )
  return scene_questions.SceneVqaSource(config, split)


def _clips(data: Mapping[str, Any], split: str) -> Source:
  from mplug_jax.data.sources import scenes

  return scenes.SceneClips(scenes.scene_config(data), split, frames=max(8, data["frames"]))


def _tfds(data: Mapping[str, Any], split: str) -> Source:
  from mplug_jax.data.sources import tfds

  return tfds.Questions(data, split)


def _entries(data: Mapping[str, Any], split: str, *keys: str) -> Iterator[tuple[Record, str]]:
  """Yields the entries of a split, which have `keys` and, in training, answers."""
  required = (*keys, "answer") if split == "train" else keys
  optional = ("question_id", "answer", "dataset", "ocr", "object_label")
  return annotations.split_entries(data, split, required, optional)


# Key of config.data with the folder of the image, image, question, location.
_Row = tuple[str, str, Record, str]


def _video_qa(data: Mapping[str, Any], split: str) -> VqaRecords:
  ids = EntryIds("question_id", split)

  def rows() -> Iterator[_Row]:
    for entry, location in _entries(data, split, "video_id", "question"):
      annotations.require_texts(entry, ("video_id",), location)
      question_id = ids.add(entry.get("question_id"), location)
      question = _parse_question(entry, question_id, location)
      yield "video_root", entry["video_id"] + data["video_suffix"], question, location

  return _records(rows(), data, split)


def _vqa_v2(data: Mapping[str, Any], split: str) -> VqaRecords:
  labels = None
  if split == "val" and data.get("label_file"):
    path = annotations.configured_file(data, "label_file")
    labels = _read_labels(path, data.get("strict", False))

  ids = EntryIds("question_id", split)

  def rows() -> Iterator[_Row]:
    for entry, location in _entries(data, split, "question_id", "question", "image", "dataset"):
      root_key = _ROOT_KEYS.get(entry["dataset"])
      if root_key is None:
        raise ValueError(
          f"{location}: dataset {entry['dataset']!r} is not one of {', '.join(_ROOT_KEYS)}."
        )
      question_id = ids.add(entry["question_id"], location)
      question = _parse_question(entry, question_id, location)
      if labels is not None:
        _apply_labels(question, labels, location)
      yield root_key, entry["image"], question, location

  return _records(rows(), data, split)


def _jsonl(data: Mapping[str, Any], split: str) -> VqaRecords:
  ids = EntryIds("question_id", split)

  def rows() -> Iterator[_Row]:
    for entry, location in _entries(data, split, "question", "image"):
      question_id = ids.add(entry.get("question_id"), location)
      question = _parse_question(entry, question_id, location)
      yield "image_root", entry["image"], question, location

  return _records(rows(), data, split)


def _question(
  question_id: Any,
  text: str,
  answers: list[str],
  dataset: str,
  ocr: str = "",
  objects: str = "",
) -> Record:
  weight = _SINGLE_ANSWER_WEIGHT.get(dataset)
  return {
    "question_id": question_id,
    "question": text,
    "answers": answers,
    "weights": None if weight is None else [weight] * len(set(answers)),
    "ocr": ocr,
    "objects": objects,
    "dataset": dataset,
  }


def _parse_question(entry: Record, question_id: Any, location: str) -> Record:
  """Makes a question of an entry; `ocr` is a list of [position, word] or a string."""
  answers: list[str] = []
  if entry.get("answer") is not None:
    answers = annotations.text_list(entry, "answer", location)
  annotations.require_texts(entry, ("question", "image", "object_label"), location)
  ocr = entry.get("ocr") or ""
  if not isinstance(ocr, str):
    try:
      ocr = " ".join(word for _, word in ocr)
    except (TypeError, ValueError):
      raise ValueError(f"{location}: ocr must be a list of [position, word] pairs.") from None
  return _question(
    question_id,
    entry["question"],
    answers,
    entry.get("dataset", "vqa"),
    ocr,
    entry.get("object_label", ""),
  )


def _records(rows: Iterable[_Row], data: Mapping[str, Any], split: str) -> VqaRecords:
  """Collects rows into records, grouped by image if so configured.

  Training questions without an answer are left out, counted and named; as `EntryErrors` says.
  """
  errors = EntryErrors(data.get("strict", False))
  records = packed.Grouped(("image", "image_id"), "questions", _QUESTION_KEYS)
  path_of = image_paths.ImagePaths()
  group = data.get("questions_per_image", 1) > 1
  roots: dict[str, Any] = {}
  for root_key, image, question, location in rows:
    if split == "train" and not any(map(str.strip, question["answers"])):
      problem = "all answers are empty" if question["answers"] else "the list of answers is empty"
      error = f"{location}: {problem}; a training question needs at least one answer."
      errors.failed(location, RecordError(error))
      continue
    errors.passed(location)
    key = (root_key, image) if group else None
    number = records.find(key) if group else None
    if number is None:
      if root_key not in roots:
        roots[root_key] = data.get(root_key)
      path = path_of(roots[root_key], root_key, image, location)
      number = records.add({"image": path, "image_id": image}, key)
    records.add_item(number, question)
  errors.end("questions")
  return VqaRecords(records.close())


def _read_labels(path: str, strict: bool) -> dict[Any, dict[str, float]]:
  """Reads soft labels [{"question_id": id, "label": {answer: score}}, ...] as {id: label}."""
  fields = annotations.Fields({"strict": strict}, ("question_id", "label"))
  repeated = BadRecords(strict, "Its last label counts.")
  labels: dict[Any, dict[str, float]] = {}
  for entry, location in annotations.entries(path, fields):
    label = entry["label"]
    if not isinstance(label, dict) or not all(map(_is_number, label.values())):
      raise ValueError(f"{location}: label must be an object {{answer: finite number}}.")
    number = canonical(entry["question_id"])
    if labels.get(number, label) != label:
      repeated.add(RecordError(f"{location}: question_id {number} has another label before."))
    labels[number] = label
  repeated.report(len(labels), f"labels of {path}")
  return labels


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)


def _apply_labels(question: Record, labels: Mapping[Any, dict[str, float]], location: str) -> None:
  """Replaces the answers of a question by its soft label; raises ValueError if it has none."""
  label = labels.get(canonical(question["question_id"]))
  if label is None:
    raise ValueError(
      f"{location}: question_id {question['question_id']} has no entry in data.label_file."
    )
  question["answers"] = list(label)
  question["weights"] = [float(score) for score in label.values()]


# config.data.name -> source.
SOURCES: dict[str, Callable[[Mapping[str, Any], str], Source]] = {
  "easy_vqa": _easy_vqa,
  "vqa_v2": _vqa_v2,
  "jsonl": _jsonl,
  "scenes": _scenes,
  "clips": _clips,
  "video_qa": _video_qa,
  "gqa": _vqa_v2,
  "tfds": _tfds,
}
