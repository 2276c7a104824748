"""Sources of VQA records, by name: `get(config.data, split)`.

A source is random access: `len(source)`, `source[i]` (a record) and, where pixels cost time,
`source.questions(i)` (the questions of record i alone). A record is

    {"image": path | encoded bytes | u8[H, W, 3], "image_id": str, "questions": [question, ...]}

and a question {"question_id": int | str, "question": str, "answers": list[str] (of every annotator,
or the keys of soft labels; empty when unknown), "weights": None (each answer weighs as often as it
was given) or one float per unique answer in order of appearance, "ocr": str, "objects": str,
"dataset": str}. Entries of files are counted from 1 in messages.
"""

import importlib.util
import pathlib
from collections.abc import Iterator

from mplug_jax.data.storage import annotations, packed

_ROOT_KEYS = {"vqa": "vqa_root", "vg": "vg_root", "gqa": "gqa_root"}
# These have one answer a question, on which nobody voted; the official fine-tuning halves it.
_SINGLE_ANSWER_WEIGHT = {"vg": 0.5, "gqa": 0.5}


class VqaRecords:
  """A sequence of VQA records as a source."""

  def __init__(self, records: list[dict]):
    self._records = records

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict:
    return self._records[index]

  def questions(self, index: int) -> list[dict]:
    return self._records[index]["questions"]


def get(data, split: str):
  """The source that `data.name` names.

  Args:
    data: config.data, a mapping with `name` and the keys of that source:
      easy_vqa: val_every (0 = no validation split; n = images of the training set whose number
        divides by n are split "val" and no longer in "train").
      vqa_v2, gqa: train_files (list), val_file, test_file in the official json format, label_file
        (soft labels of val_file, optional), vqa_root, vg_root, gqa_root (folders of images, each
        needed only if the files name that dataset, docs/official.md item 21), questions_per_image.
        All sources of files: fields, see `json_records.Fields`.
      jsonl: train_files, val_file, test_file in any format of `json_records.entries`, an object a
        line or row: image, question, answer (a string or the list of all annotators' answers), and
        optionally question_id, ocr, object_label; image_root, questions_per_image.
      video_qa: train_files, val_file, test_file with one object a line, as MSR-VTT and MSVD have
        them: video_id, question, answer; video_root, video_suffix (".mp4"). Its "images" are clips,
        see data.frames.
      tfds: builder, data_dir, splits, fields, questions_per_image; see tfds_source.py.
      scenes, clips: size, seed, difficulty of `mplug_jax.scenes.scene.SceneConfig`; images, or
        clips of data.frames.
    split: "train", "val" or "test". Only "train" insists on answers.

  Returns:
    A source; questions of one image make one record if questions_per_image > 1 (always for
    easy_vqa), otherwise every question is a record.

  Raises:
    ValueError: unknown name or split, unset key, malformed file (names file and entry).
    FileNotFoundError: a file, one of the first images or the package is missing.
  """
  builders = {
    "easy_vqa": _easy_vqa,
    "vqa_v2": _vqa_v2,
    "jsonl": _jsonl,
    "scenes": _scenes,
    "clips": _clips,
    "video_qa": _video_qa,
    "gqa": _vqa_v2,
    "tfds": _tfds,
  }
  if data["name"] not in builders:
    raise ValueError(f"data.name is {data['name']!r}; known sources: {', '.join(builders)}.")
  if split not in ("train", "val", "test"):
    raise ValueError(f"Split {split!r} does not exist; known splits: train, val, test.")
  return builders[data["name"]](data, split)


_QUESTION_KEYS = ("question_id", "question", "answers", "weights", "ocr", "objects", "dataset")


def questions_of(source, index: int) -> list[dict]:
  """The questions of record `index`, without making its image if the source can."""
  if hasattr(source, "questions"):
    return source.questions(index)
  return source[index]["questions"]


def texts(source, records: int = 0) -> Iterator[str]:
  """Questions, each followed by its unique answers: what a tokenizer is fitted to.

  Args:
    records: read this many records, evenly spaced; 0: all.
  """
  for index in range(0, len(source), max(1, len(source) // records) if records else 1):
    for question in questions_of(source, index):
      yield question["question"]
      yield from dict.fromkeys(question["answers"])


def answer_list(data) -> list[str]:
  """The candidate answers for ranking, from the json list `data.answer_list`.

  Raises:
    ValueError: the key is unset, or the file is neither a json list of strings nor an object, whose
      keys are the answers.
    FileNotFoundError: the file does not exist.
  """
  path = annotations.configured_file(data, "answer_list")
  answers = annotations.read_json(path)
  answers = list(answers) if isinstance(answers, dict) else answers
  if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
    raise ValueError(f"{path} must be a json list of strings, the candidate answers.")
  return answers


def _easy_vqa(data, split):
  """The PyPI package easy-vqa; a question's id is its row in the split's questions.json."""
  spec = importlib.util.find_spec("easy_vqa")
  if spec is None:
    raise FileNotFoundError("data.name easy_vqa needs the package easy-vqa: pip install easy-vqa.")
  folder = pathlib.Path(spec.submodule_search_locations[0], "data")
  val_every = data.get("val_every", 0)
  if split == "val" and not val_every:
    raise ValueError(
      "easy_vqa has no validation split of its own; set data.val_every, for "
      "instance to 20, to hold out every 20th training image."
    )
  folder = folder / ("test" if split == "test" else "train")
  records = {}
  for row, (text, answer, number) in enumerate(annotations.read_json(folder / "questions.json")):
    held_out = bool(val_every) and number % val_every == 0
    if split != "test" and held_out != (split == "val"):
      continue
    record = records.setdefault(
      number,
      {"image": str(folder / "images" / f"{number}.png"), "image_id": str(number), "questions": []},
    )
    record["questions"].append(_question(row, text, [answer], "easy_vqa"))
  return VqaRecords([records[number] for number in sorted(records)])


def _scenes(data, split):
  from mplug_jax.scenes import questions as scene_questions
  from mplug_jax.scenes import scene

  config = scene.SceneConfig(
    data.get("size"), data.get("seed", 0), data.get("difficulty", "default")
  )
  return scene_questions.SceneVqaSource(config, split)


def _clips(data, split):
  from mplug_jax.data.sources import scenes as scene_sources

  return scene_sources.SceneClips(
    scene_sources.scene_config(data), split, frames=max(8, data.frames)
  )


def _tfds(data, split):
  from mplug_jax.data.sources import tfds

  return tfds.Questions(data, split)


def _entries(data, split, *keys):
  """The entries of a split, which have `keys`; those of training have answers as well."""
  optional = ("question_id", "answer", "dataset", "ocr", "object_label")
  return annotations.split_entries(
    data, split, (*keys, "answer") if split == "train" else keys, optional
  )


def _video_qa(data, split):
  def rows():
    for number, (entry, where) in enumerate(_entries(data, split, "video_id", "question")):
      annotations.require_texts(entry, ("video_id",), where)
      yield (
        "video_root",
        entry["video_id"] + data.video_suffix,
        _parse_question(entry, number, where, split == "train"),
        where,
      )

  return _records(rows(), data)


def _vqa_v2(data, split):
  labels = None
  if split == "val" and data.get("label_file"):
    labels = _read_labels(annotations.configured_file(data, "label_file"))

  def rows():
    for entry, where in _entries(data, split, "question_id", "question", "image", "dataset"):
      root_key = _ROOT_KEYS.get(entry["dataset"])
      if root_key is None:
        raise ValueError(
          f"{where}: dataset {entry['dataset']!r} is not one of {', '.join(_ROOT_KEYS)}."
        )
      question = _parse_question(entry, entry["question_id"], where, split == "train")
      if labels is not None:
        _apply_labels(question, labels, where)
      yield root_key, entry["image"], question, where

  return _records(rows(), data)


def _jsonl(data, split):
  def rows():
    for number, (entry, where) in enumerate(_entries(data, split, "question", "image")):
      yield (
        "image_root",
        entry["image"],
        _parse_question(entry, entry.get("question_id", number), where, split == "train"),
        where,
      )

  return _records(rows(), data)


def _question(question_id, text, answers, dataset, ocr="", objects=""):
  weight = _SINGLE_ANSWER_WEIGHT.get(dataset)
  weights = None if weight is None else [weight] * len(set(answers))
  return {
    "question_id": question_id,
    "question": text,
    "answers": answers,
    "weights": weights,
    "ocr": ocr,
    "objects": objects,
    "dataset": dataset,
  }


def _parse_question(entry, question_id, where, training):
  """One entry of a file -> question. `ocr` is a list of [position, word] or a string."""
  answers = annotations.text_list(entry, "answer", where) if "answer" in entry else []
  if training and not answers:
    raise ValueError(
      f"{where}: the list of answers is empty; a training question needs at least one answer."
    )
  annotations.require_texts(entry, ("question", "image", "object_label"), where)
  ocr = entry.get("ocr") or ""
  if not isinstance(ocr, str):
    try:
      ocr = " ".join(word for _, word in ocr)
    except (TypeError, ValueError):
      raise ValueError(f"{where}: ocr must be a list of [position, word] pairs.") from None
  return _question(
    question_id,
    entry["question"],
    answers,
    entry.get("dataset", "vqa"),
    ocr,
    entry.get("object_label", ""),
  )


def _records(rows, data):
  """Rows (root key, image, question, where) -> source, grouped by image if so configured."""
  records, path_of = (
    packed.Grouped(("image", "image_id"), "questions", _QUESTION_KEYS),
    annotations.ImagePaths(),
  )
  group, roots = data.get("questions_per_image", 1) > 1, {}
  for root_key, image, question, where in rows:
    key = (root_key, image) if group else None
    number = records.find(key) if group else None
    if number is None:
      if root_key not in roots:
        roots[root_key] = data.get(root_key)
      number = records.add(
        {"image": path_of(roots[root_key], root_key, image, where), "image_id": image}, key
      )
    records.add_item(number, question)
  return VqaRecords(records.close())


def _read_labels(path):
  """Soft labels [{"question_id": id, "label": {answer: score}}, ...] -> {id: label}."""
  labels = {}
  for entry, _ in annotations.entries(path, annotations.Fields({}, ("question_id", "label"))):
    labels[entry["question_id"]] = entry["label"]
  return labels


def _apply_labels(question, labels, where):
  label = labels.get(question["question_id"])
  if label is None:
    raise ValueError(
      f"{where}: question_id {question['question_id']} has no entry in data.label_file."
    )
  question["answers"] = list(label)
  question["weights"] = [float(score) for score in label.values()]
