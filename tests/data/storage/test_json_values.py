"""Values of JSON files: repeated keys and invalid texts are named, and nothing else is changed."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug_jax.data import check, errors
from mplug_jax.data.prepare import json_stream
from mplug_jax.data.sources import caption, classification, grounding, vqa
from mplug_jax.data.storage import annotations, json_values
from tests.support import tiny_run
from tools import prepare_data, score_captions

LONE = "\ud83d"
PROBLEM = "no valid Unicode (the lone surrogate \\ud83d)"
PLACE = "U+FFFD takes its place."


def write(path, *rows):
  """Writes rows that are values, or lines of JSON."""
  texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  ends = ("[", ",\n", "]") if path.suffix == ".json" else ("", "\n", "\n")
  path.write_text(ends[0] + ends[1].join(texts) + ends[2])
  return str(path)


def read(function, *arguments):
  """Returns (result, what was noted)."""
  with errors.noted() as notes:
    return function(*arguments), notes


@pytest.fixture
def picture(tmp_path):
  (tmp_path / "a.png").write_bytes(b"")
  return "a.png"


def files(tmp_path, path, **more):
  return {"name": "jsonl", "train_files": (path,), "image_root": str(tmp_path), "strict": False} | {
    **more
  }


# ---- invalid texts


@pytest.mark.parametrize(("name", "where"), [("x.jsonl", "line 2"), ("x.json", "entry 2")])
def test_every_source_repairs_and_names_an_invalid_text(tmp_path, picture, name, where):
  path = str(tmp_path / name)
  more = {"questions_per_image": 1, "expressions_per_image": 1, "images_per_text": 1}
  data = files(tmp_path, path, labels=("yes", "no"), **more)
  for get, row, key in (
    (vqa.get, {"image": picture, "question": "why", "answer": "x"}, "question"),
    (vqa.get, {"image": picture, "question": "why", "answer": ["x", "y"]}, "answer"),
    (caption.images, {"image": picture, "caption": ["a", "b"]}, "caption"),
    (grounding.get, {"image": picture, "text": "it", "box": [0, 0, 1, 1]}, "text"),
    (
      classification.jsonl,
      {"image": picture, "sentence": "so", "label": "yes"},
      "sentence",
    ),
  ):
    bad = row[key] + LONE if isinstance(row[key], str) else [f"{LONE}{x}" for x in row[key]]
    write(tmp_path / name, row, row | {key: bad}, row)
    source, notes = read(get, data, "train")
    assert notes == [f"{path}, {where}: {key} is {PROBLEM}. {PLACE}"]
    content = json.dumps([source[i] for i in range(len(source))], default=str)
    assert ("\\ufffd" in content, "\\ud83d" in content) == (True, False)
    with pytest.raises(errors.RecordError, match=f"{where}: {key} is no valid Unicode"):
      get(data | {"strict": True}, "train")


def test_cells_of_tables_and_other_files_too(tmp_path, picture):
  table = tmp_path / "x.csv"
  table.write_text('image,caption\na.png,"[""one"", ""two \\ud83d""]"\n')
  source, notes = read(caption.images, files(tmp_path, str(table)), "train")
  assert source.captions(0) == ["one", "two \ufffd"]
  assert notes == [f"{table}, row 2: caption is {PROBLEM}. {PLACE}"]

  answers = write(tmp_path / "answers.json", '"yes"', json.dumps(f"no {LONE}"))
  listed, notes = read(vqa.answer_list, {"answer_list": answers, "name": "jsonl"})
  assert (listed, notes) == (
    ["yes", "no \ufffd"],
    [f"{answers}, entry 2: the text is {PROBLEM}. {PLACE}"],
  )
  tiny_run.refused(
    lambda: vqa.answer_list({"answer_list": answers, "name": "jsonl", "strict": True}),
    f"{answers}, entry 2: the text is {PROBLEM}.",
  )

  coco = tmp_path / "coco.json"
  content = {
    "images": [{"id": 1, "file_name": picture}],
    "annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": f"b{LONE}"}],
  }
  coco.write_text(json.dumps(content))
  source, notes = read(caption.images, files(tmp_path, str(coco), name="nocaps"), "train")
  assert source.captions(0) == ["a", "b\ufffd"]
  assert notes == [f"{coco}, annotations, entry 2: caption is {PROBLEM}. {PLACE}"]
  entry = {"filename": picture, "filepath": "", "split": "train", "sentences": [{"raw": LONE}]}
  coco.write_text(json.dumps({"images": [entry]}))
  source, notes = read(caption.images, files(tmp_path, str(coco), name="karpathy"), "train")
  assert source.captions(0) == ["\ufffd"]
  assert notes == [f"{coco}, images, entry 1: sentences is {PROBLEM}. {PLACE}"]


def test_soft_labels_too(tmp_path, picture):
  row = {"image": picture, "question": "why", "question_id": 1, "dataset": "vqa"}
  val = write(tmp_path / "val.json", row)
  labels = write(tmp_path / "labels.json", {"question_id": 1, "label": {f"x{LONE}": 1.0}})
  data = files(tmp_path, "", name="vqa_v2", val_file=val, label_file=labels)
  data |= {"vqa_root": str(tmp_path), "questions_per_image": 1}
  source, notes = read(vqa.get, data, "val")
  assert source.questions(0)[0]["answers"] == ["x\ufffd"]
  assert notes == [f"{labels}, entry 1: label is {PROBLEM}. {PLACE}"]
  with pytest.raises(errors.RecordError, match=r"labels.json, entry 1"):
    vqa.get(data | {"strict": True}, "val")


def test_a_second_label_of_a_question_is_named(tmp_path, picture):
  row = {"image": picture, "question": "why", "question_id": 1, "dataset": "vqa"}
  val = write(tmp_path / "val.json", row)
  scores = (1.0, 1.0, 0.5)
  labels = write(
    tmp_path / "labels.json", *({"question_id": 1, "label": {"x": score}} for score in scores)
  )
  data = files(tmp_path, "", name="vqa_v2", val_file=val, label_file=labels)
  data |= {"vqa_root": str(tmp_path), "questions_per_image": 1}
  source, notes = read(vqa.get, data, "val")
  assert source.questions(0)[0]["weights"] == [0.5]
  problem = f"{labels}, entry 3: question_id 1 has another label before."
  assert notes == [f"{problem} Its last label counts."]
  with pytest.raises(errors.RecordError, match="entry 3: question_id 1 has another label before"):
    vqa.get(data | {"strict": True}, "val")


def test_ten_are_named_and_all_are_counted(tmp_path, picture):
  rows = [{"image": picture, "image_id": i, "caption": f"{i} {LONE}"} for i in range(25)]
  path = write(tmp_path / "x.jsonl", *rows)
  source, notes = read(caption.images, files(tmp_path, path), "train")
  assert len(source) == 25
  assert len(notes) == 11
  assert notes[9].startswith(f"{path}, line 10: ")
  assert notes[10] == f"{path}: 25 entries have invalid Unicode."


def test_the_names_of_files_that_are_not_utf8_stay(tmp_path):
  name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
  try:
    (tmp_path / name).write_bytes(b"")
  except OSError:
    pytest.skip("this file system has no such names")
  path = write(tmp_path / "x.jsonl", {"image": name, "caption": f"a {name}"})
  source, notes = read(caption.images, files(tmp_path, path), "train")
  assert source[0]["image"] == f"{tmp_path}/{name}"
  assert source.captions(0) == ["a caf\ufffd.png"]
  assert len(notes) == 1
  write(tmp_path / "x.jsonl", {"image": f"{LONE}.png", "caption": "a"})
  tiny_run.refused(
    lambda: caption.images(files(tmp_path, path), "train"), f"{path}, line 1: image", "\ufffd.png"
  )


def test_the_check_names_an_invalid_text(tmp_path, picture, capsys):
  row = {"image": picture, "question": "why", "answer": "x"}
  path = write(tmp_path / "train.jsonl", row, row | {"answer": f"x{LONE}"})
  prepare_data.main(["check", path, "--task=vqa"])
  assert f"warning: {path}, line 2: answer is {PROBLEM}. {PLACE}" in capsys.readouterr().out
  config = tiny_run.config(f"data=jsonl:{path}", data__strict=True)
  with pytest.raises(errors.RecordError, match="line 2: answer is no valid Unicode"):
    check.check(config)


def test_the_check_prints_names_that_are_not_utf8(tmp_path, capsys):
  row = {"image": b"caf\xe9.png".decode("utf-8", "surrogateescape"), "caption": "a dog"}
  (tmp_path / "a.png").write_bytes(b"")
  good = {"image": "a.png", "caption": "a cat"}
  path = write(tmp_path / "train.jsonl", good, good | {"image_id": 1}, good | {"image_id": 2}, row)
  prepare_data.main(["check", path, "--task=caption"])
  out = capsys.readouterr().out
  assert "missing: " in out
  assert "caf\\udce9.png" in out


def test_lines_keep_invalid_texts_for_their_reader(tmp_path):
  path = write(tmp_path / "x.jsonl", {"question": LONE}, {"question": "\U0001f600"})
  values, notes = read(lambda: list(annotations.lines(path)))
  assert [value["question"] for value, _ in values] == [LONE, "\U0001f600"]
  assert notes == []


def test_tools_that_prepare_data_name_them_too(tmp_path):
  path = tmp_path / "x.json"
  path.write_text('{"info": {"a": "\\ud83d"}, "rows": [{"a": "x"}, {"a": "\\ud83d", "a": "y"}]}')
  others = {}
  rows, notes = read(lambda: list(json_stream.entries(path, {"a": str}, "rows", others)))
  assert [row["a"] for row, _ in rows] == ["x", "y"]
  assert others == {"info": {"a": "\ufffd"}}
  assert notes == [
    f"{path}, info: a is {PROBLEM}. {PLACE}",
    f"{path}, rows, entry 2: the key 'a' is repeated. Its last value counts.",
  ]
  path.write_text('{"b": {"a": "\\ud83d"}}', encoding="utf-8-sig")
  rows, notes = read(lambda: list(json_stream.members(path, {"a": str})))
  assert rows == [("b", {"a": "\ufffd"}, f"{path}, key 'b'")]
  assert notes == [f"{path}, key 'b': a is {PROBLEM}. {PLACE}"]


def test_files_of_captions_to_score_are_read_as_others(tmp_path, capsys):
  results, references = tmp_path / "results.json", tmp_path / "references.json"
  content = {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a red dog"}]}
  results.write_text('[{"image_id": 1, "caption": "a red dog"}]', encoding="utf-8-sig")
  references.write_text(json.dumps(content), encoding="utf-8-sig")
  arguments = [str(results), str(references), "--metrics", "ROUGE-L"]
  assert score_captions.main(arguments) == 0
  assert "100.00" in capsys.readouterr().out
  results.write_text("[]", encoding="utf-16")
  assert score_captions.main(arguments) == 2
  assert f"{results} is UTF-16 or UTF-32 text" in capsys.readouterr().err


# ---- repeated keys


def test_a_repeated_key_is_named(tmp_path, picture):
  line = '{"image": "b.png", "caption": "one", "image": "a.png"}'
  for name, where in (("x.jsonl", "line 1"), ("x.json", "entry 1")):
    path = write(tmp_path / name, line)
    source, notes = read(caption.images, files(tmp_path, path), "train")
    assert source[0]["image_id"] == "a.png"
    assert notes == [f"{path}, {where}: the key 'image' is repeated. Its last value counts."]
    with pytest.raises(errors.RecordError, match=f"{where}: the key 'image' is repeated"):
      caption.images(files(tmp_path, path, strict=True), "train")
  values, notes = read(lambda: list(annotations.lines(write(tmp_path / "x.jsonl", line))))
  assert values[0][0] == {"image": "a.png", "caption": "one"}
  assert len(notes) == 1
  whole = tmp_path / "whole.json"
  whole.write_text('{"images": [1], "images": [2]}')
  value, notes = read(annotations.read_json, whole)
  assert value == {"images": [2]}
  assert notes == [f"{whole}: the key 'images' is repeated. Its last value counts."]


# ---- properties

LITERAL = "\\" + "ud83d"  # six characters, as JSON writes a surrogate


@pytest.mark.parametrize(
  "text",
  [
    "\ud83d",
    "end \ude00",
    "x\ude00\ud83d",
    "\U0001f600\ud83d",
    "\ud83d\U0001f600",
    LITERAL + "\ude00",
  ],
)
def test_every_lone_surrogate_is_found_and_no_pair(text):
  parser = json_values.Parser()
  for form in (json.dumps(text), json.dumps(text).upper().replace("U", "u")):
    assert json_values.Checks().value(parser.decode(form), "x") != parser.decode(form)
    assert parser.suspicious
  for valid_text in ("\U0001f600", "a\U0001f600\U0001f601b", "\ud7ff\ue000"):
    for form in (json.dumps(valid_text), json.dumps(valid_text).upper().replace("U", "u")):
      parser.decode(form)
      assert not parser.suspicious


TEXTS = st.text(st.characters(exclude_categories=()), max_size=6)


def nested(inner):
  return inner | st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)


VALUES = nested(nested(st.none() | st.booleans() | st.integers() | TEXTS))


def texts_of(value):
  if isinstance(value, str):
    yield value
  elif isinstance(value, list):
    for item in value:
      yield from texts_of(item)
  elif isinstance(value, dict):
    for key, item in value.items():
      yield key
      yield from texts_of(item)


def valid(text):
  return not any("\ud800" <= character <= "\udfff" for character in text)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(VALUES)
def test_a_value_is_as_it_was_or_named(value):
  text = json.dumps(value)
  parser = json_values.Parser()
  parsed = parser.decode(text)
  assert parsed == json.loads(text)
  checks = json_values.Checks()
  result, notes = read(lambda: checks.value(parsed, "x") if parser.suspicious else parsed)
  if all(map(valid, texts_of(parsed))):
    assert (result, notes) == (parsed, [])
  else:
    assert all(map(valid, texts_of(result)))
    assert checks.invalid.count > 0 < len(notes)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers()), max_size=5), st.booleans())
def test_no_value_of_a_key_is_lost_without_a_word(pairs, nested):
  text = "{" + ", ".join(f'"{key}": {value}' for key, value in pairs) + "}"
  text = f'[{{"x": {text}}}]' if nested else text
  parser = json_values.Parser()
  parsed, _ = parser.raw_decode(text)
  checks = json_values.Checks()
  _, notes = read(lambda: checks.value(parsed, "x") if parser.suspicious else parsed)
  keys = [key for key, _ in pairs]
  repeated = {key for key in keys if keys.count(key) > 1}
  assert {note.split("'")[1] for note in notes} == repeated
  strict = json_values.Checks(strict=True)
  if repeated:
    with pytest.raises(errors.RecordError):
      strict.value(parsed, "x")
  else:
    assert strict.value(parsed, "x") == json.loads(text)
