"""Ids of entries: unique in evaluated splits, free in training, else the numbers of the rows."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mplug_jax.data.sources import caption, classification, grounding, vqa
from mplug_jax.data.sources.entry_ids import EntryIds
from mplug_jax.metrics.ids import canonical
from tests.support import shard_files, tfds_case

IDS = st.one_of(st.none(), st.integers(0, 6), st.sampled_from(["0", "1", "5", "007", "a", "b", ""]))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(IDS, max_size=7))
def test_ids_of_an_evaluated_split_differ_or_two_locations_are_named(given_ids):
  expected = [number if i is None else i for number, i in enumerate(given_ids)]
  ids = EntryIds("id", "val")
  seen = {}
  for number, (given_id, entry_id) in enumerate(zip(given_ids, expected, strict=True), 1):
    if first := seen.get(canonical(entry_id)):
      with pytest.raises(ValueError, match=f"^line {number}: .* also that of line {first}, "):
        ids.add(given_id, f"line {number}")
      break
    seen[canonical(entry_id)] = number
    assert ids.add(given_id, f"line {number}") == entry_id
  training = EntryIds("id", "train")
  assert [training.add(i, "") for i in given_ids] == expected


@pytest.mark.parametrize("wrong", [[1], {"a": 1}, True, float("nan")])
def test_ids_of_an_evaluated_split_are_numbers_or_texts(wrong):
  with pytest.raises(ValueError, match="line 1: id must be a number or text, not "):
    EntryIds("id", "test").add(wrong, "line 1")


@pytest.mark.parametrize(
  ("value", "written"),
  [
    (7, 7),
    ("7", 7),
    (7.0, 7),
    ("007", "007"),
    ("7.5", "7.5"),
    (7.5, "7.5"),
    ("-3", -3),
    ("x", "x"),
  ],
)
def test_canonical_ids(value, written):
  assert canonical(value) == written
  assert type(canonical(value)) is type(written)


# Each task reads entries {"image": ..., the keys of ENTRY, an id}.

TASKS = {
  "vqa": (vqa.get, "question_id", {"question": "What?", "answer": "dog"}),
  "caption": (caption.images, "image_id", {"caption": "A dog"}),
  "grounding": (grounding.get, "id", {"text": "the dog", "box": [0, 0, 3, 3]}),
  "classification": (classification.jsonl, "id", {"sentence": "A dog.", "label": "yes"}),
}


@pytest.fixture
def read(tmp_path):
  """Function (task, rows) -> its source; each row is the id of an entry and its image."""
  for name in ("a", "b", "c"):
    Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")

  def read(task, rows, split="val", **data):
    get, key, entry = TASKS[task]
    lines = [
      {"image": f"{image}.png", **entry} | ({} if entry_id == "none" else {key: entry_id})
      for entry_id, image in rows
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
      "name": "jsonl",
      "train_files": [str(path)],
      "val_file": str(path),
      "image_root": str(tmp_path),
      "questions_per_image": 1,
      "expressions_per_image": 1,
      "images_per_text": 1,
      "labels": ("yes", "no"),
    }
    return get(config | data, split)

  return read


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("ids", [(100, 100), (7, "7"), (7, 7.0), ("x", "x")])
def test_two_entries_with_one_id(read, task, ids):
  rows = [(ids[0], "a"), (3, "b"), (ids[1], "c")]
  with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: .*(already|also) that") as caught:
    read(task, rows)
  assert "rows.jsonl, line 1" in str(caught.value)
  assert f"{TASKS[task][1]} {ids[1]!r}" in str(caught.value)
  if task != "caption":
    assert len(read(task, rows, "train")) == 3


@pytest.mark.parametrize("task", ["vqa", "grounding", "classification"])
def test_a_row_number_that_is_the_id_of_another_row(read, task):
  key = TASKS[task][1]
  for rows, line, first in (
    ([(1, "a"), ("none", "b")], 2, 1),
    ([("none", "a"), (5, "b"), ("0", "c")], 3, 1),
    ([("none", "a"), (None, "b"), (1, "c")], 3, 2),
  ):
    with pytest.raises(ValueError, match=f"line {line}: .*{key}.* line {first}, "):
      read(task, rows)
    assert len(read(task, rows, "train")) == len(rows)


def test_rows_without_ids_are_numbered(read):
  rows = [("none", "a"), (None, "b"), ("none", "c")]
  source = read("vqa", rows)
  assert [source.questions(i)[0]["question_id"] for i in range(3)] == [0, 1, 2]
  source = read("grounding", rows)
  assert [source.expressions(i)[0]["id"] for i in range(3)] == ["0", "1", "2"]
  source = read("classification", rows)
  assert [source.row(i)["id"] for i in range(3)] == [0, 1, 2]
  source = read("caption", rows)
  assert [source[i]["image_id"] for i in range(3)] == ["a.png", "b.png", "c.png"]


def test_captions_of_one_image_are_joined_whatever_the_type_of_its_id(read):
  source = read("caption", [(7, "a"), ("7", "a"), ("none", "b")])
  assert [source[i]["image_id"] for i in range(len(source))] == [7, "b.png"]
  assert len(source.captions(0)) == 2
  with pytest.raises(ValueError, match="line 1: image_id must be a number or text, not \\[1\\]"):
    read("caption", [([1], "a")])


def test_refcoco_and_video_questions_with_one_id(read, tmp_path):
  path = tmp_path / "refs.json"
  entry = {"image": "a.png", "bbox": [0, 0, 2, 2], "sentences": ["one", "two"], "ref_id": 5}
  data = {"name": "refcoco", "val_file": str(path), "train_files": [str(path)]}
  data |= {"image_root": str(tmp_path), "expressions_per_image": 1}
  path.write_text(json.dumps([entry]))
  source = grounding.get(data, "val")
  assert [source.expressions(i)[0]["id"] for i in range(2)] == ["5-0", "5-1"]
  path.write_text(json.dumps([entry, entry]))
  with pytest.raises(ValueError, match="entry 2: ref_id '5-0' is also that of .*, entry 1, "):
    grounding.get(data, "val")
  assert len(grounding.get(data, "train")) == 4

  path = tmp_path / "clips.jsonl"
  data = {"name": "video_qa", "val_file": str(path), "video_root": str(tmp_path)}
  data |= {"video_suffix": ".png", "questions_per_image": 1}
  rows = [{"video_id": "a", "question": "What?", "question_id": i} for i in (42, 43, 42)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
  source = vqa.get(data, "val")
  assert [source.questions(i)[0]["question_id"] for i in range(2)] == [42, 43]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  with pytest.raises(ValueError, match="line 3: question_id 42 is also that of .*, line 1, "):
    vqa.get(data, "val")


def test_an_image_that_nocaps_lists_twice_has_its_captions_once(tmp_path):
  Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
  path = tmp_path / "nocaps.json"
  image = {"id": 1, "file_name": "a.png"}
  path.write_text(
    json.dumps({"images": [image, image], "annotations": [{"image_id": 1, "caption": "A dog"}]})
  )
  data = {"name": "nocaps", "val_file": str(path), "image_root": str(tmp_path)}
  source = caption.images(data, "val")
  assert len(source) == 1
  assert source.captions(0) == ["a dog"]


def test_soft_labels_are_found_by_equal_ids_and_the_last_counts(tmp_path):
  Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
  question = {"question_id": "7", "question": "What?", "image": "a.png", "dataset": "vqa"}
  (tmp_path / "val.json").write_text(json.dumps([question]))
  labels = tmp_path / "labels.json"
  data = {"name": "vqa_v2", "val_file": str(tmp_path / "val.json"), "label_file": str(labels)}
  data |= {"vqa_root": str(tmp_path), "questions_per_image": 1}
  labels.write_text(json.dumps([{"question_id": 7, "label": {"red": 1}}]))
  assert vqa.get(data, "val").questions(0)[0]["weights"] == [1.0]
  labels.write_text(json.dumps([{"question_id": i, "label": {"red": 1}} for i in (7, "7")]))
  assert vqa.get(data | {"strict": True}, "val").questions(0)[0]["weights"] == [1.0]
  entries = [{"question_id": i, "label": {"red": weight}} for i, weight in ((7, 1), ("7", 0.5))]
  labels.write_text(json.dumps(entries))
  assert vqa.get(data, "val").questions(0)[0]["weights"] == [0.5]
  with pytest.raises(ValueError, match="entry 2: question_id 7 has another label before"):
    vqa.get(data | {"strict": True}, "val")
  for label in (["red"], {"red": "1"}, {"red": float("inf")}):
    labels.write_text(json.dumps([{"question_id": 7, "label": label}]))
    with pytest.raises(ValueError, match="entry 1: label must be an object {answer: finite"):
      vqa.get(data, "val")


def test_pairs_of_a_tar_with_one_key(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  members = [
    (f"{key}.{extension}", data)
    for key in ("1", "2", "1")
    for extension, data in (("jpg", shard_files.picture(1)), ("txt", b"a dog"))
  ]
  path = tmp_path / "val.tar"
  path.write_bytes(shard_files.tar_bytes(members))
  data = {"name": "shards", "train_files": [str(path)], "val_file": str(path), "image_root": ""}
  assert len(caption.images(data, "train")) == 3
  with pytest.raises(ValueError, match="val.tar, pair 3: key '.*/1' is also that of .*, pair 1, "):
    caption.images(data, "val")
  path.write_bytes(shard_files.tar_bytes(members[:4]))
  assert len(caption.images(data, "val")) == 2


def questions_set(folder, examples):
  features = {
    "image": tfds_case.FEATURES.Image(),
    "image_id": tfds_case.FEATURES.Text(),
    "questions": tfds_case.FEATURES.Sequence(
      {name: tfds_case.FEATURES.Text() for name in ("id", "question", "answer")}
    ),
  }
  rows = [
    {
      "image": tfds_case.image(i),
      "image_id": image_id,
      "questions": [dict(zip(("id", "question", "answer"), row)) for row in questions],
    }
    for i, (image_id, questions) in enumerate(examples)
  ]
  tfds_case.prepare(folder, "asked", "", features, {"train": rows, "val": rows, "test": rows})
  fields = "question_id=questions/id,question=questions/question,answer=questions/answer"
  return tfds_case.config("vqa", f"data=tfds:asked,root={folder}", data__fields=fields)


def test_questions_of_a_tfds_set(tmp_path):
  shared = ("1", "What is it?", "dog"), ("1", "What is it?", "cat"), ("2", "Why?", "dog")
  c = questions_set(tmp_path / "good", [("x", shared), ("y", [("3", "Who?", "man")])])
  asked = vqa.get(c.data, "val").questions(0)
  assert [(q["question_id"], q["answers"]) for q in asked] == [("1", ["dog", "cat"])]
  c = questions_set(tmp_path / "bad", [("x", shared), ("x", [("2", "Who?", "man")])])
  with pytest.raises(ValueError, match="record 1, questions 0: question_id '2' is also that of"):
    vqa.get(c.data, "val")
  assert len(vqa.get(c.data, "train")) == 3
  captions = tfds_case.config("caption", f"data=tfds:asked,root={tmp_path / 'bad'}")
  captions.data.fields = "caption=questions/question"
  with pytest.raises(ValueError, match="record 1: image_id 'x' is also that of .* record 0, "):
    caption.images(captions.data, "val")


def test_different_questions_of_a_tfds_record_with_one_id_are_not_merged(tmp_path):
  c = questions_set(tmp_path, [("x", [("1", "What is it?", "dog"), ("1", "Why?", "dog")])])
  assert len(vqa.get(c.data, "train")) == 2
  with pytest.raises(ValueError, match="questions 1: question_id '1' is also that of"):
    vqa.get(c.data, "test")
