"""VQA sources against files made here, and easy-VQA against the package's own files."""

import json
import pathlib
import pickle

import easy_vqa
import ml_collections
import numpy as np
import pytest
from PIL import Image

from mplug_jax.data.errors import RecordError
from mplug_jax.data.sources import vqa

STOP = {
  "question_id": 42000,
  "question": "What does the sign say?",
  "image": "a/one.png",
  "dataset": "vqa",
  "answer": ["stop", "stop", "stop sign", "stop"],
  "ocr": [[[10.0, 20.0, 50.0, 40.0], "STOP"], [[0, 0, 1, 1], "ALL"]],
  "object_label": "sign&&pole&&tree&&sign",
}
COLOUR = {
  "question_id": 42001,
  "question": "What color is it?",
  "image": "a/one.png",
  "dataset": "vqa",
  "answer": ["red"] * 10,
}
GENOME = {
  "question_id": 7,
  "question": "Who?",
  "image": "two.png",
  "dataset": "vg",
  "answer": "a man",
}
BALANCED = {
  "question_id": "g1",
  "question": "Is it red?",
  "image": "three.png",
  "dataset": "gqa",
  "answer": "yes",
}


def save_image(path):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)


@pytest.fixture
def data(tmp_path):
  """config.data of a VQA v2 data set with three images in three roots."""
  for name in ("coco/a/one.png", "vg/two.png", "gqa/three.png"):
    save_image(tmp_path / name)
  return ml_collections.ConfigDict(
    {
      "name": "vqa_v2",
      "questions_per_image": 1,
      "val_file": "",
      "label_file": "",
      "train_files": [
        write(tmp_path, "train.json", [STOP, COLOUR]),
        write(tmp_path, "vg.json", [GENOME, BALANCED]),
      ],
      "test_file": write(
        tmp_path, "test.json", [{key: value for key, value in STOP.items() if key != "answer"}]
      ),
      "vqa_root": str(tmp_path / "coco"),
      "vg_root": str(tmp_path / "vg"),
      "gqa_root": str(tmp_path / "gqa"),
    }
  )


def write(folder, name, content):
  path = folder / name
  path.write_text(content if isinstance(content, str) else json.dumps(content))
  return str(path)


def set_train(data, tmp_path, content):
  data.train_files = [write(tmp_path, "bad.json", content)]


def all_questions(source):
  return [question for index in range(len(source)) for question in source.questions(index)]


def test_official_rows(data, tmp_path):
  source = vqa.get(data, "train")
  assert len(source) == 4
  assert source[0] == {
    "image": str(tmp_path / "coco/a/one.png"),
    "image_id": "a/one.png",
    "questions": [
      {
        "question_id": 42000,
        "question": "What does the sign say?",
        "answers": ["stop", "stop", "stop sign", "stop"],
        "weights": None,
        "ocr": "STOP ALL",
        "objects": "sign&&pole&&tree&&sign",
        "dataset": "vqa",
      }
    ],
  }
  assert source[2]["image"] == str(tmp_path / "vg/two.png")
  assert source[3]["image"] == str(tmp_path / "gqa/three.png")
  for index, answer in ((2, "a man"), (3, "yes")):
    (question,) = source.questions(index)
    assert (question["answers"], question["weights"]) == ([answer], [0.5])
    assert (question["ocr"], question["objects"]) == ("", "")


def test_questions_are_grouped_by_image(data):
  data.questions_per_image = 2
  source = vqa.get(data, "train")
  assert [[q["question_id"] for q in source.questions(i)] for i in range(len(source))] == [
    [42000, 42001],
    [7],
    ["g1"],
  ]


def test_test_rows_need_no_answers(data):
  (question,) = all_questions(vqa.get(data, "test"))
  assert question["answers"] == []
  assert question["weights"] is None


def test_soft_labels_of_validation(data, tmp_path):
  data.val_file = write(tmp_path, "val.json", [STOP, COLOUR])
  assert all_questions(vqa.get(data, "val"))[0]["answers"] == STOP["answer"]
  labels = [
    {"question_id": 42001, "label": {"red": 1, "pink": 0.3}},
    {"question_id": 42000, "label": {}},
  ]
  data.label_file = write(tmp_path, "labels.json", labels)
  stop, colour = all_questions(vqa.get(data, "val"))
  assert (stop["answers"], stop["weights"]) == ([], [])
  assert (colour["answers"], colour["weights"]) == (["red", "pink"], [1.0, 0.3])
  data.label_file = write(tmp_path, "labels.json", labels[:1])
  with pytest.raises(ValueError, match="val.json, entry 1: question_id 42000 has no entry"):
    vqa.get(data, "val")


def test_gqa_root_is_optional(data, tmp_path):
  del data.gqa_root
  with pytest.raises(ValueError, match=r"vg.json, entry 2: .*three.png.* data.gqa_root"):
    vqa.get(data, "train")
  data.train_files = [write(tmp_path, "vg_only.json", [GENOME])]
  assert len(vqa.get(data, "train")) == 1


def test_malformed_json_is_located(data, tmp_path):
  set_train(data, tmp_path, '[\n {"question_id": 1,\n  "question" "x"}]')
  with pytest.raises(ValueError, match=r"bad.json, line 3, column 14: not valid JSON"):
    vqa.get(data, "train")


@pytest.mark.parametrize("key", ["question_id", "question", "image", "dataset", "answer"])
def test_missing_key_is_located(data, tmp_path, key):
  entry = {name: value for name, value in COLOUR.items() if name != key}
  set_train(data, tmp_path, [STOP, entry])
  with pytest.raises(ValueError, match=rf"bad.json, entry 2: key '{key}' is missing"):
    vqa.get(data, "train")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"answer": ["red", 3]}, "entry 2: answer must be a string or a list of strings"),
    ({"answer": {"red": 1.0}}, "entry 2: answer must be a string or a list of strings"),
    ({"question": 3}, "entry 2: question must be a string"),
    ({"image": None}, "entry 2: image must be a string"),
    ({"dataset": "coco"}, "entry 2: dataset 'coco' is not one of vqa, vg, gqa"),
    ({"ocr": [["STOP"]]}, r"entry 2: ocr must be a list of \[position, word\] pairs"),
  ],
)
def test_wrong_values_are_located(data, tmp_path, change, message):
  set_train(data, tmp_path, [STOP, {**COLOUR, **change}])
  with pytest.raises(ValueError, match=message):
    vqa.get(data, "train")


@pytest.mark.parametrize(
  ("answers", "problem"),
  [([], "the list of answers is empty"), (["", " "], "all answers are empty")],
)
def test_a_training_question_without_answers_is_counted_and_named(
  data, tmp_path, caplog, answers, problem
):
  bad = {**COLOUR, "answer": answers}
  set_train(data, tmp_path, [STOP, bad, COLOUR])
  source = vqa.get(data, "train")
  assert [q["question"] for i in range(len(source)) for q in source.questions(i)] == [
    STOP["question"],
    COLOUR["question"],
  ]
  (message,) = caplog.messages
  assert f"bad.json, entry 2: {problem}; a training question needs at least one answer" in message
  data.strict = True
  with pytest.raises(RecordError, match=f"entry 2: {problem}"):
    vqa.get(data, "train")
  data.strict = False
  set_train(data, tmp_path, [bad, bad])
  with pytest.raises(
    ValueError, match=f"entry 1: {problem}; .* None of the questions of .*bad.json"
  ):
    vqa.get(data, "train")


@pytest.mark.parametrize(
  ("content", "message"),
  [({"questions": []}, "must hold a json list"), ([STOP, "x"], "entry 2: must be an object")],
)
def test_wrong_structure(data, tmp_path, content, message):
  set_train(data, tmp_path, content)
  with pytest.raises(ValueError, match=message):
    vqa.get(data, "train")


def test_missing_files(data, tmp_path):
  data.train_files = [str(tmp_path / "none.json")]
  with pytest.raises(FileNotFoundError, match="data.train_files names .*none.json"):
    vqa.get(data, "train")
  with pytest.raises(ValueError, match="data.val_file is not set"):
    vqa.get(data, "val")
  data.train_files = []
  with pytest.raises(ValueError, match="data.train_files must be a list"):
    vqa.get(data, "train")
  (tmp_path / "coco/a/one.png").unlink()
  with pytest.raises(FileNotFoundError, match="entry 1: image .*one.png .*data.vqa_root"):
    vqa.get(data, "test")


def test_only_the_first_images_are_looked_for(data, tmp_path):
  late = [{**COLOUR, "question_id": i, "image": "gone.png"} for i in range(3)]
  set_train(data, tmp_path, [STOP] * 3 + late)
  assert len(vqa.get(data, "train")) == 6


def test_answer_list(data, tmp_path):
  data.answer_list = write(tmp_path, "answers.json", ["yes", "no"])
  assert vqa.answer_list(data) == ["yes", "no"]
  data.answer_list = write(tmp_path, "answers.json", {"yes": 1, "no": 0})  # as video QA has them
  assert vqa.answer_list(data) == ["yes", "no"]
  data.answer_list = write(tmp_path, "answers.json", ["yes", 1])
  with pytest.raises(ValueError, match="must be a json list of strings"):
    vqa.answer_list(data)


def jsonl(tmp_path, lines):
  save_image(tmp_path / "images" / "1.png")
  path = write(
    tmp_path,
    "mine.jsonl",
    "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines),
  )
  return {
    "name": "jsonl",
    "train_files": [path],
    "test_file": path,
    "image_root": str(tmp_path / "images"),
    "questions_per_image": 4,
  }


def test_texts_of_some_records_are_evenly_spaced():
  source = vqa.VqaRecords(
    [{"questions": [{"question": f"{i}?", "answers": []}]} for i in range(10)]
  )
  assert list(vqa.texts(source, 5)) == ["0?", "2?", "4?", "6?", "8?"]
  assert list(vqa.texts(source, 100)) == list(vqa.texts(source)) == [f"{i}?" for i in range(10)]


def test_jsonl(tmp_path):
  data = jsonl(
    tmp_path,
    [
      {"image": "1.png", "question": "one?", "answer": "é"},
      "",
      {"image": "1.png", "question": "two?", "answer": ["a", "b", "a"], "question_id": "q"},
    ],
  )
  source = vqa.get(data, "train")
  assert len(source) == 1
  one, two = source.questions(0)
  assert (one["question_id"], one["answers"], one["weights"]) == (0, ["é"], None)
  assert (two["question_id"], two["answers"], two["weights"]) == ("q", ["a", "b", "a"], None)
  assert list(vqa.texts(source)) == ["one?", "é", "two?", "a", "b"]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"image": "1.png", "question": }', "mine.jsonl, line 3, column 32: not valid JSON"),
    ({"image": "1.png", "question": "x"}, "line 3: key 'answer' is missing"),
    ({"image": "1.png", "answer": "x"}, "line 3: key 'question' is missing"),
    ("[1]", "line 3: must be an object with question, image"),
  ],
)
def test_jsonl_errors_name_the_line(tmp_path, line, message):
  good = {"image": "1.png", "question": "one?", "answer": "1"}
  with pytest.raises(ValueError, match=message):
    vqa.get(jsonl(tmp_path, [good, "", line]), "train")


def test_not_text(tmp_path):
  data = jsonl(tmp_path, [])
  pathlib.Path(data["test_file"]).write_bytes(b"\x93NUMPY")
  with pytest.raises(ValueError, match=r"mine.jsonl is not UTF-8 text \(byte 0\)"):
    vqa.get(data, "test")


@pytest.mark.parametrize(
  ("split", "images", "read_questions", "read_images"),
  [
    ("train", 4000, easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
    ("test", 1000, easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
  ],
)
def test_easy_vqa_is_the_whole_package(split, images, read_questions, read_images):
  source = vqa.get({"name": "easy_vqa"}, split)
  assert len(source) == images
  paths = {str(number): path for number, path in read_images().items()}
  found = {}
  for index in range(len(source)):
    record = source[index]
    assert pathlib.Path(record["image"]).samefile(paths[record["image_id"]])
    for question in record["questions"]:
      assert question["question_id"] not in found
      found[question["question_id"]] = (
        question["question"],
        *question["answers"],
        int(record["image_id"]),
      )
  assert [found[row] for row in range(len(found))] == list(zip(*read_questions(), strict=True))


def test_easy_vqa_validation_split_is_held_out():
  data = {"name": "easy_vqa", "val_every": 20}
  train, val = vqa.get(data, "train"), vqa.get(data, "val")
  ids = [{source[i]["image_id"] for i in range(len(source))} for source in (train, val)]
  assert len(val) == 200
  assert len(train) == 3800
  assert not ids[0] & ids[1]
  assert len(vqa.get(data, "test")) == 1000
  with pytest.raises(ValueError, match="set data.val_every"):
    vqa.get({"name": "easy_vqa"}, "val")


def test_easy_vqa_missing(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(FileNotFoundError, match="pip install easy-vqa"):
    vqa.get({"name": "easy_vqa"}, "train")


def test_unknown_names():
  with pytest.raises(ValueError, match="'coco'; known sources: easy_vqa, vqa_v2, jsonl, scenes"):
    vqa.get({"name": "coco"}, "train")
  with pytest.raises(ValueError, match="Split 'dev' does not exist"):
    vqa.get({"name": "easy_vqa"}, "dev")


def test_sources_travel_to_worker_processes(data):
  source = vqa.get(data, "train")
  assert pickle.loads(pickle.dumps(source))[1] == source[1]


def test_scenes():
  source = vqa.get({"name": "scenes", "size": 48, "seed": 1, "difficulty": "default"}, "val")
  record = source[3]
  assert len(source) == 1000
  assert record["image"].shape == (48, 48, 3)
  assert vqa.questions_of(source, 3) == record["questions"]
  assert all(question["answers"] for question in record["questions"])
