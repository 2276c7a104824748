"""Every reader of text decodes alike, and rows of every format come back or are refused."""

import csv
import gzip
import io
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tensorflow_datasets.core import features as tfds_features

from mplug_jax.data import errors
from mplug_jax.data.prepare import json_stream
from mplug_jax.data.sources import caption, grounding, vqa
from mplug_jax.data.storage import annotations, tabular
from tests.support import shard_files, tiny_run
from tests.support.tfds_case import FEATURES, config, image, prepare

ROW = {"image": "a.png", "caption": "A café"}


def captions(folder, name, source="jsonl"):
  data = {"name": source, "train_files": (f"{folder}/{name}",), "image_root": str(folder)}
  return caption.images(data, "train").captions(0)


def karpathy(folder, name):
  return captions(folder, name, source="karpathy")


def answers(folder, name):
  return vqa.answer_list({"name": "jsonl", "answer_list": f"{folder}/{name}"})


def image_folder(folder, name):
  del name
  return caption.images({"name": "folder", "image_root": str(folder)}, "train").captions(0)


def lines(folder, name):
  return [line.rstrip() for line in tabular.lines(folder / name)]


def stream(folder, name):
  return [entry["caption"] for entry, _ in json_stream.entries(folder / name, {"caption": str})]


SENTENCES = {"filename": "a.png", "filepath": "", "sentences": [{"raw": "A café"}]}
READERS = [
  (captions, "x.jsonl", json.dumps(ROW, ensure_ascii=False) + "\n", ["a café"]),
  (captions, "x.json", json.dumps([ROW], ensure_ascii=False), ["a café"]),
  (captions, "x.csv", "image,caption\na.png,A café\n", ["a café"]),
  (captions, "x.tsv", "image\tcaption\na.png\tA café\n", ["a café"]),
  (captions, "x.jsonl.gz", json.dumps(ROW, ensure_ascii=False), ["a café"]),
  (karpathy, "x.json", json.dumps([SENTENCES], ensure_ascii=False), ["a café"]),
  (
    karpathy,
    "x.json",
    json.dumps({"images": [SENTENCES | {"split": "train"}]}, ensure_ascii=False),
    ["a café"],
  ),
  (answers, "x.json", '["café"]', ["café"]),
  (image_folder, "train/a.txt", "A café\n", ["a café"]),
  (lines, "x.txt", "A café\n", ["A café"]),
  (stream, "x.json", json.dumps([ROW], ensure_ascii=False), ["A café"]),
]


@pytest.mark.parametrize(("read", "name", "text", "expected"), READERS, ids=range(len(READERS)))
def test_readers_decode_alike(tmp_path, read, name, text, expected):
  def write(data):
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)

  (tmp_path / "train").mkdir()
  for place in ("a.png", "train/a.png"):
    (tmp_path / place).write_bytes(b"")
  for encoding in ("utf-8", "utf-8-sig"):
    write(text.encode(encoding))
    assert read(tmp_path, name) == expected
  message = f"{tmp_path}/{name} is UTF-16 or UTF-32 text; save it as UTF-8."
  for data in (text.encode("utf-16"), b"\xfe\xff" + text.encode("utf-16-be")):
    write(data)
    tiny_run.refused(lambda: read(tmp_path, name), message)
  write(text.encode("latin-1"))
  byte = text.encode("latin-1").index(0xE9)
  tiny_run.refused(
    lambda: read(tmp_path, name), f"{tmp_path}/{name} is not UTF-8 text (byte {byte})."
  )


def test_what_follows_a_value_or_a_gzip_file_is_not_dropped(tmp_path):
  (tmp_path / "a.png").write_bytes(b"")
  line = json.dumps(ROW).encode() + b"\n"
  path = tmp_path / "x.jsonl.gz"
  path.write_bytes(gzip.compress(line) + gzip.compress(line))  # joined by cat
  assert captions(tmp_path, path.name) == ["a café"] * 2
  path.write_bytes(gzip.compress(line) + b"garbage")
  tiny_run.refused(lambda: captions(tmp_path, path.name), f"{path} is not a complete gzip file")
  (tmp_path / "x.jsonl").write_bytes(line.rstrip() + line)
  tiny_run.refused(
    lambda: captions(tmp_path, "x.jsonl"), "x.jsonl, line 1, column", "not valid JSON (Extra data)"
  )


def test_texts_and_columns_of_parquet(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  (tmp_path / "a.png").write_bytes(b"")
  raw = pyarrow.array([b"one", b"caf\xe9"], pyarrow.binary())
  text = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
  names = pyarrow.array(["a.png", "a.png"])
  parquet.write_table(
    pyarrow.table([names, text], names=["image", "caption"]), tmp_path / "x.parquet"
  )
  tiny_run.refused(
    lambda: captions(tmp_path, "x.parquet"), "x.parquet, row 2: column 'caption' is not UTF-8 text."
  )
  table = pyarrow.table([names, names, names], names=["image", "caption", "caption"])
  parquet.write_table(table, tmp_path / "x.parquet")
  tiny_run.refused(
    lambda: captions(tmp_path, "x.parquet"),
    "x.parquet: column 'caption' is repeated among its columns, which must name every column once.",
  )


def test_texts_of_tfds(tmp_path):
  features = {"image": FEATURES.Image(), "caption": FEATURES.Sequence(FEATURES.Text())}
  texts = ["\ufeffA café", "plain"]
  example = {"image": image(1), "caption": texts}
  folder = prepare(tmp_path, "pictures", "", features, {"train": [example]})
  c = config("caption", f"data=tfds:pictures,root={folder}")
  source = caption.images(c.data, "train")
  assert source.captions(0) == ["a café", "plain"]
  location = "pictures/1.1.0, split train, record 0"
  invalid = [b"caf\xe9", b"\xed\xa0\xbd", b"\xef\xbb\xbfok"]
  with errors.noted() as notes:
    texts = source._split.texts(invalid, location)
  assert texts == ["caf\ufffd", "\ufffd\ufffd\ufffd", "ok"]
  assert notes == [
    f"{location}: a text is not UTF-8. U+FFFD takes the place of wrong bytes."
  ]  # named once
  c.data.strict = True
  strict = caption.images(c.data, "train")
  with pytest.raises(errors.RecordError, match=f"{location}: a text is not UTF-8"):
    strict._split.texts(invalid, location)
  assert strict[0]["image"] == shard_files.picture(1)


def test_texts_of_tfds_have_their_partners(tmp_path):
  boxes = {
    "bbox": FEATURES.BBoxFeature(),
    "raw": FEATURES.Sequence(FEATURES.Text()),
    "ids": FEATURES.Sequence(np.int64),
  }
  features = {"image": FEATURES.Image(), "objects": FEATURES.Sequence(boxes)}
  box = tfds_features.BBox(0.0, 0.0, 1.0, 1.0)
  objects = [{"bbox": box, "raw": ["a", "b"], "ids": [1]}]
  example = {"image": image(1), "objects": objects}
  folder = prepare(tmp_path, "boxes", "", features, {"train": [example]})
  fields = "text=objects/raw,box=objects/bbox,id=objects/ids"
  c = config("grounding", f"data=tfds:boxes,root={folder}", data__fields=fields)
  tiny_run.refused(lambda: grounding.get(c.data, "train"), "record 0: box 0 has 2 texts and 1 ids.")
  features = {
    "image": FEATURES.Image(),
    "question": FEATURES.Sequence(FEATURES.Text()),
    "answer": FEATURES.Sequence(FEATURES.Text()),
  }
  example = {"image": image(1), "question": ["why"], "answer": ["x", "y"]}
  folder = prepare(tmp_path, "asked", "", features, {"train": [example]})
  c = config("vqa", f"data=tfds:asked,root={folder}")
  tiny_run.refused(
    lambda: vqa.get(c.data, "train"), "record 0 has 1 values of question and 2 of answer"
  )


# ---- property

# What a cell of a table means when it is empty, or begins as JSON does, is tested elsewhere.
TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8).filter(
  lambda text: text.strip() and text[0] not in "[{\ufeff"
)


def encoded(rows, kind):
  """Returns the bytes of rows in a format."""
  if kind == "json":
    return json.dumps(rows, ensure_ascii=False).encode()
  if kind == "jsonl":
    return "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows).encode()
  file = io.StringIO(newline="")
  writer = csv.writer(file, delimiter={"csv": ",", "tsv": "\t"}[kind], lineterminator="\r\n")
  writer.writerow(["image", "caption"])
  writer.writerows([row["image"], row["caption"]] for row in rows)
  return file.getvalue().encode()


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
  texts=st.lists(TEXT, min_size=1, max_size=4),
  kind=st.sampled_from(["json", "jsonl", "csv", "tsv"]),
  mark=st.booleans(),
  zipped=st.booleans(),
)
@example(["a\0b", "a\u2028", "\x1c x", 'say "x"', "a\rb", "\ufffe"], "csv", True, False)
def test_every_row_comes_back(tmp_path_factory, texts, kind, mark, zipped):
  folder = tmp_path_factory.mktemp("rows")
  rows = [{"image": "/a.png", "caption": text} for text in texts]
  data = b"\xef\xbb\xbf" * mark + encoded(rows, kind)
  path = folder / f"x.{kind}{'.gz' * zipped}"
  path.write_bytes(gzip.compress(data) if zipped else data)
  fields = annotations.Fields({"name": "x", "strict": True}, ("image", "caption"))
  assert [entry for entry, _ in annotations.entries(path, fields)] == rows
