"""Annotation files in every format, through the sources of several tasks.

Files that cannot be read raise an error that names file and row.
"""

import csv
import gzip
import json
import tracemalloc

import ml_collections
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from mplug_jax.data.examples import classification
from mplug_jax.data.sources import caption, grounding, vqa
from mplug_jax.data.storage import annotations, tabular
from tests.support.tiny_run import refused

SUFFIXES = (
  ".json",
  ".jsonl",
  ".json.gz",
  ".jsonl.gz",
  ".csv",
  ".CSV",
  ".csv.gz",
  ".tsv",
  ".parquet",
)
QUESTIONS = [
  {
    "question_id": 17,
    "image": "a.png",
    "question": 'What does "it", the sign,\nsay?',
    "answer": ["stop", "stop", "halt"],
  },
  {"question_id": -3, "image": "b.png", "question": "Where? é", "answer": "[there] it is"},
  {"question_id": "007", "image": "a.png", "question": "How many?", "answer": "2"},
]


def write(folder, name, rows, bom=b""):
  """A file of the rows in the format that its name says."""
  path = folder / name
  kind = name.lower().removesuffix(".gz").rsplit(".", 1)[1]
  if kind == "parquet":
    columns = {key: [row.get(key) for row in rows] for key in rows[0]}
    for key, values in columns.items():  # a column has one type
      if any(isinstance(value, list) for value in values):
        columns[key] = [
          value if value is None or isinstance(value, list) else [value] for value in values
        ]
      elif any(isinstance(value, str) for value in values):
        columns[key] = [None if value is None else str(value) for value in values]
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return str(path)
  if kind == "json":
    text = json.dumps(rows, ensure_ascii=False)
  elif kind == "jsonl":
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
  else:
    with open(folder / "buffer", "w", newline="", encoding="utf-8") as file:
      writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
      writer.writerow(rows[0])
      writer.writerows(
        [json.dumps(value) if isinstance(value, list) else value for value in row.values()]
        for row in rows
      )
    text = (folder / "buffer").read_bytes().decode()
  data = bom + text.encode()
  path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
  return str(path)


@pytest.fixture
def folder(tmp_path):
  for name in ("a.png", "b.png"):
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / name)
  return tmp_path


def config(folder, *names, **changes):
  """config.data of source jsonl, for any task."""
  paths = [name if "/" in name else str(folder / name) for name in names]
  return ml_collections.ConfigDict(
    {
      "name": "jsonl",
      "train_files": paths,
      "val_file": paths[0],
      "test_file": paths[0],
      "image_root": str(folder),
      "fields": "",
      "questions_per_image": 1,
      "expressions_per_image": 1,
      "images_per_text": 1,
      "labels": ("yes", "no"),
      **changes,
    }
  )


# ---- formats


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_questions_are_the_same_in_every_format(folder, suffix, bom):
  source = vqa.get(config(folder, write(folder, f"mine{suffix}", QUESTIONS, bom)), "train")
  found = [
    (record["image"], *record["questions"])
    for record in map(source.__getitem__, range(len(source)))
  ]
  assert [image for image, _ in found] == [f"{folder}/{row['image']}" for row in QUESTIONS]
  assert [question["question"] for _, question in found] == [row["question"] for row in QUESTIONS]
  assert [question["answers"] for _, question in found] == [
    ["stop", "stop", "halt"],
    ["[there] it is"],
    ["2"],
  ]
  ids = [question["question_id"] for _, question in found]
  assert ids == (
    ["17", "-3", "007"] if suffix == ".parquet" else [17, -3, "007"]
  )  # of its columns Parquet says the type


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_captions_are_the_same_in_every_format(folder, suffix):
  rows = [
    {"image": "a.png", "caption": "One, two", "image_id": 5},
    {"image": "b.png", "caption": "three", "image_id": 6},
    {"image": "a.png", "caption": "Four", "image_id": 5},
  ]
  source = caption.images(config(folder, write(folder, f"mine{suffix}", rows)), "train")
  assert [(source[i]["image_id"], source.captions(i)) for i in range(len(source))] == [
    (5, ["one, two", "four"]),
    (6, ["three"]),
  ]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_boxes_and_classes_in_every_format(folder, suffix):
  path = write(
    folder, f"boxes{suffix}", [{"image": "a.png", "text": "it", "box": [0.0, 1.5, 3.0, 4.0]}]
  )
  source = grounding.get(config(folder, path), "train")
  assert source.expressions(0) == [{"id": "0", "text": "it", "box": (0, 1.5, 3, 4)}]
  path = write(
    folder, f"classes{suffix}", [{"image": "a.png", "sentence": "So?", "label": "yes", "id": 9}]
  )
  source = classification.get_source(config(folder, path), "train")
  assert source.row(0) == {"id": 9, "sentence": "So?", "label": "yes"}


def test_what_is_empty_in_a_table_is_not_there(folder):
  rows = [
    {"image": "a.png", "question": "One?", "answer": "1"},
    {"image": "a.png", "question": "Two?", "answer": None},
  ]
  for name in ("mine.csv", "mine.parquet"):
    data = config(folder, write(folder, name, rows))
    source = vqa.get(data, "test")
    assert [source.questions(i)[0]["answers"] for i in (0, 1)] == [["1"], []]
    refused(
      lambda data=data: vqa.get(data, "train"),
      f"{name}, row {3 if name == 'mine.csv' else 2}: 'answer' is empty",
    )


def test_files_of_several_formats_train_together(folder):
  names = [
    write(folder, f"part{i}{suffix}", QUESTIONS[:2])
    for i, suffix in enumerate((".json", ".csv", ".parquet"))
  ]
  assert len(vqa.get(config(folder, *names), "train")) == 6


# ---- sizes


def test_files_are_not_read_as_a_whole(tmp_path):
  """Of 6 MB only a small part is in memory, and rows come before the end has been read."""
  rows = [{"image": f"{i}.png", "caption": "x" * 1000} for i in range(6000)]
  fields = annotations.Fields({}, ("image", "caption"))
  for name in ("many.jsonl", "many.jsonl.gz", "many.csv"):
    path = write(tmp_path, name, rows)
    tracemalloc.start()
    count = sum(1 for _ in annotations.entries(path, fields))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 6000
    assert peak < 1e6, name


def test_parquet_is_read_a_few_rows_and_the_wanted_columns_at_a_time(tmp_path):
  path = str(tmp_path / "many.parquet")
  parquet.write_table(
    pyarrow.table({"image": [f"{i}.png" for i in range(5000)], "pixels": [b"x" * 100] * 5000}),
    path,
    row_group_size=700,
  )
  columns, rows = tabular.open_table(path, {"image", "absent"})
  assert columns == ["image", "pixels"]
  assert next(rows) == ({"image": "0.png"}, f"{path}, row 1")
  assert [where for _, where in rows] == [f"{path}, row {i}" for i in range(2, 5001)]


# ---- names of keys


FIELDS = "question=q, image=file,answer=a"
THEIRS = [
  {"q": row["question"], "file": row["image"], "a": row["answer"], "image": "elsewhere.png"}
  for row in QUESTIONS[:2]
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_keys_may_be_called_otherwise(folder, suffix):
  path = write(folder, f"theirs{suffix}", THEIRS)
  source = vqa.get(config(folder, path, fields=FIELDS), "train")
  assert [(source[i]["image_id"], source.questions(i)[0]["question"]) for i in (0, 1)] == [
    (row["image"], row["question"]) for row in QUESTIONS[:2]
  ]
  where = f"theirs{suffix}" + {".json": ", entry 1", ".jsonl": ", line 1"}.get(suffix, "")
  refused(
    lambda: vqa.get(config(folder, path, fields="image=file"), "train"),
    f"{where}: key 'question' is missing; it has q, file, a, image; name it with "
    f"--config.data.fields=question=...",
  )
  refused(
    lambda: vqa.get(config(folder, path, fields=FIELDS.replace("=q", "=Q")), "train"),
    f"{where}: key 'Q', which config.data.fields names for 'question', is missing; it has q, "
    f"file, a, image.",
  )


def test_keys_of_other_tasks_may_be_called_otherwise(folder):
  path = write(folder, "theirs.csv", [{"path": "a.png", "text": "A dog", "image_id": "3"}])
  source = caption.images(config(folder, path, fields="image=path,caption=text"), "train")
  assert (source[0]["image_id"], source.captions(0)) == (3, ["a dog"])
  path = write(
    folder,
    "boxes.json",
    [{"image": "a.png", "expression": "it", "bbox": [0, 0, 2, 2], "box": "unused"}],
  )
  assert grounding.get(
    config(folder, path, fields="text=expression,box=bbox"), "train"
  ).expressions(0)[0]["box"] == (0, 0, 2, 2)
  path = write(
    folder, "images.json", [{"file": "a.png", "split": "train", "sentences": [{"raw": "It"}]}]
  )
  assert caption.images(
    config(folder, path, name="karpathy", fields="filename=file"), "train"
  ).captions(0) == ["it"]


def test_one_of_their_keys_may_serve_twice_and_keys_may_change_places(folder):
  path = write(folder, "x.jsonl", [{"image": "A dog", "caption": "a.png"}])
  source = caption.images(
    config(folder, path, fields="image=caption,caption=image,image_id=caption"), "train"
  )
  assert (source[0]["image_id"], source.captions(0)) == ("a.png", ["a dog"])


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      "qestion=q",
      "config.data.fields: 'qestion' is no key of source jsonl, which knows question, image, "
      "answer, question_id, ",
    ),
    ("question", "config.data.fields: 'question' must be written OURS=THEIRS"),
    ("question=", "config.data.fields: 'question=' must be written OURS=THEIRS"),
    ("question=q,question=a", "config.data.fields names 'question' twice"),
    (
      f"{FIELDS},ocr=words",
      "theirs.json: no entry has the key 'words', which config.data.fields names for 'ocr'.",
    ),
  ],
)
def test_names_of_keys_that_cannot_be(folder, fields, message):
  path = write(folder, "theirs.json", THEIRS)
  refused(lambda: vqa.get(config(folder, path, fields=fields), "train"), message)


def test_a_test_split_needs_no_answers_under_any_name(folder):
  path = write(folder, "theirs.jsonl", [{"q": "One?", "file": "a.png"}])
  assert vqa.get(config(folder, path, fields=FIELDS), "test").questions(0)[0]["answers"] == []


def test_nocaps_has_no_other_names(folder):
  (folder / "val.json").write_text('{"images": []}')
  data = config(folder, "val.json", name="nocaps", fields="caption=c")
  refused(
    lambda: caption.images(data, "val"),
    "config.data.fields cannot rename keys of source nocaps",
  )


# ---- what cannot be read


GOOD = "image,question,answer\na.png,One?,1\n"
LINE = json.dumps(QUESTIONS[0]).encode() + b"\n"
BAD = [
  ("x.csv", "", "x.csv is empty; its first row must name the columns"),
  ("x.csv", "image,question,image\n", "x.csv: column 'image' is repeated in the first row"),
  (
    "x.csv",
    "image,question\na.png,One?\n",
    "x.csv: key 'answer' is missing; it has image, question; name it with",
  ),
  (
    "x.csv",
    GOOD + "\na.png,Red, or blue?,red\n",
    "x.csv, row 4: it has 4 cells and the first row 3; a cell with ','",
  ),
  ("x.csv", GOOD + "a.png\n", "x.csv, row 3: it has 1 cells and the first row 3"),
  ("x.csv", GOOD + ",Two?,2\n", "x.csv, row 3: 'image' is empty"),
  ("x.csv", GOOD + 'a.png,"Two?,2\n', "x.csv, row 3: not valid CSV (unexpected end of data)"),
  ("x.tsv", GOOD.replace(",", "\t") + '"a" b\tTwo?\t2\n', "x.tsv, row 3: not valid TSV ("),
  ("x.csv", GOOD.encode() + b"\xff", "x.csv is not UTF-8 text (byte 35)"),
  ("x.jsonl", LINE + b'\n{"a": "\xe9"}', f"x.jsonl is not UTF-8 text (byte {len(LINE) + 8})"),
  ("x.jsonl", "[" * 100_000, "x.jsonl, line 1: lists or objects are nested too deeply"),
  (
    "x.json",
    '{"image": "a.png"}\n{"image": "b.png"}\n',
    "x.json, line 2, column 1: not valid JSON (Extra data); a file with an object on every line "
    "must be called .jsonl",
  ),
  ("x.jsonl.gz", b"plain text", "x.jsonl.gz is not a complete gzip file (Not a gzipped file"),
  (
    "x.jsonl.gz",
    gzip.compress(LINE * 100)[:-12],
    "x.jsonl.gz is not a complete gzip file (Compressed file ended",
  ),
  ("x.parquet", b"PAR1 and nothing more", "x.parquet is not a Parquet file, or is damaged ("),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=range(len(BAD)))
def test_a_file_that_cannot_be_read_is_located(folder, name, content, message):
  (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  refused(lambda: vqa.get(config(folder, name), "train"), message)


def test_damage_inside_a_parquet_file(folder):
  path = write(
    folder, "x.parquet", [row | {"question": f"{i} " * 2000} for i, row in enumerate(QUESTIONS)]
  )
  data = bytearray((folder / "x.parquet").read_bytes())
  data[4:40] = b"\xff" * 36
  (folder / "x.parquet").write_bytes(data)
  refused(
    lambda: vqa.get(config(folder, path), "train"),
    "x.parquet is not a Parquet file, or is damaged (",
  )


def test_parquet_needs_its_package(folder, monkeypatch):
  path = write(folder, "x.parquet", QUESTIONS)
  monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
  refused(
    lambda: vqa.get(config(folder, path), "train"),
    "x.parquet can only be read with the package pyarrow: pip install pyarrow.",
  )
