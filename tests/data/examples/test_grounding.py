"""Referring expressions: official lists, JSON files and scenes as records; examples."""

import json
import pathlib
import pickle
import tempfile

import numpy as np
import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug_jax.data.errors import RecordError
from mplug_jax.data.examples import grounding
from mplug_jax.data.sources import grounding as grounding_lib
from mplug_jax.data.sources.chunked import Chunked
from mplug_jax.tensor_files import torch_annotations
from tests.support import torch_pickles
from tests.support.grounding_case import (
  expression,
)
from tests.support.grounding_files import config, legacy, painted, png, write_jsonl

# ---- sources


def vg(tmp_path, name, entries, form=legacy, split="train", **changes):
  """Writes one official list and its images, and returns the source."""
  for folder in (
    "other/images/mscoco/images/train2014",
    "referit/images",
    "Flickr30k/flickr30k_images",
  ):
    (tmp_path / "ln_data" / folder).mkdir(parents=True, exist_ok=True)
    for i in range(3):
      (tmp_path / "ln_data" / folder / f"{i}.jpg").write_bytes(
        png(painted(40, 60, red=(10, 10, 30, 30)))
      )
  path = tmp_path / "data" / name / f"{name}_{split}.pth"
  path.parent.mkdir(parents=True, exist_ok=True)
  if form is legacy:
    path.write_bytes(legacy(entries))
  else:
    torch_pickles.archive(path, torch_pickles.Op(pickle.dumps(entries, 2)[2:-1]))
  return config(f"large,data=transvg,dataset={name},root={tmp_path}", **changes).data


def zipped(entries):
  return entries


@pytest.mark.parametrize("form", [legacy, zipped])
def test_the_official_lists_in_both_forms_of_torch_save(tmp_path, form):
  entries = [
    ("0.jpg", "0_1.pth", [10.6, 10, 20, 20], "man on Left", [("r1", ["man"])]),
    ("0.jpg", "0_2.pth", np.array([1.0, 2.5, 3.0, 4.0]), "dog", []),
    ("1.jpg", "1_2.pth", tuple(np.int64([0, 0, 5, 6])), "the cat", None),
  ]
  source = grounding_lib.get(vg(tmp_path, "unc", entries, form), "train")
  assert [r["image_id"] for r in map(source.__getitem__, range(3))] == ["0.jpg", "0.jpg", "1.jpg"]
  expressions = [source.expressions(i)[0] for i in range(len(source))]
  assert [e["text"] for e in expressions] == ["man on Left", "dog", "the cat"]
  # [x, y, width, height] in whole pixels, as the official code cuts them.
  assert [e["box"] for e in expressions] == [(10, 10, 30, 30), (1, 2, 4, 6), (0, 0, 5, 6)]
  assert [e["id"] for e in expressions] == ["0", "1", "2"]
  grouped = grounding_lib.get(
    vg(tmp_path, "unc", entries, form, data__expressions_per_image=2), "train"
  )
  assert [len(grouped.expressions(i)) for i in range(len(grouped))] == [2, 1]


def test_corner_boxes_and_the_tuples_of_flickr(tmp_path):
  referit = vg(tmp_path, "referit", [("1.jpg", "1.mat", np.array([3, 4, 13, 24]), "sky", [])])
  assert grounding_lib.get(referit, "train").expressions(0)[0]["box"] == (3, 4, 13, 24)
  flickr = vg(tmp_path, "flickr", [("2.jpg", [3, 4, 13, 24], "a wall")])
  source = grounding_lib.get(flickr, "train")
  assert source[0]["image"].endswith("Flickr30k/flickr30k_images/2.jpg")
  assert source.expressions(0)[0]["text"] == "a wall"


def test_the_union_trains_on_four_lists_and_validates_on_refcoco(tmp_path):
  for name in ("referit", "unc", "unc+", "gref_umd"):
    vg(tmp_path, name, [("0.jpg", "", [1, 2, 13, 14], name, [])])
  vg(tmp_path, "unc", [("0.jpg", "", [1, 2, 13, 14], "validation", [])], split="val")
  data = config(f"large,data=transvg,dataset=vg_uni,root={tmp_path}").data
  assert list(grounding.texts(grounding_lib.get(data, "train"))) == [
    "referit",
    "unc",
    "unc+",
    "gref_umd",
  ]
  assert list(grounding.texts(grounding_lib.get(data, "val"))) == ["validation"]


@pytest.mark.parametrize(
  ("entries", "message"),
  [
    (
      [("0.jpg", "", [1, 2, 3], "x", [])],
      "unc_train.pth, entry 1: the box must be a list of four numbers, .x, y, width, height.",
    ),
    ([("0.jpg", "", [1, 2, 0, 4], "x", [])], "entry 1: the box .* is empty"),
    (
      [("0.jpg", "", [1, 2, float("nan"), 4], "x", [])],
      "entry 1: the box must be a list of four numbers",
    ),
    (
      [("0.jpg", "", np.array(["a", "b", "c", "d"]), "x", [])],
      "entry 1: the box must be a list of four numbers",
    ),
    ([("0.jpg", "", [1, 2, 3, 4], 5, [])], "entry 1: text must be a string"),
    ([("0.jpg", [1, 2, 3, 4], "x")], "entry 1: must be a tuple of 5 values"),
    ({"a": 1}, "must hold a list of tuples"),
    (
      [("9.jpg", "", [1, 2, 3, 4], "x", [])],
      "entry 1: image .*9.jpg does not exist; check data.image_root",
    ),
  ],
)
def test_unusable_lists(tmp_path, entries, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    grounding_lib.get(vg(tmp_path, "unc", entries), "train")


class Hostile:
  def __reduce__(self):
    return (exec, ("raise SystemExit('code of the file was run')",))


@pytest.mark.parametrize("form", [legacy, zipped])
def test_lists_run_no_code(tmp_path, form):
  data = vg(tmp_path, "unc", [("0.jpg", "", Hostile(), "x", [])], form)
  with pytest.raises(ValueError, match="entry 1: the box must be a list of four numbers"):
    grounding_lib.get(data, "train")


def test_arrays_in_lists_are_read_and_other_objects_are_not_built(tmp_path):
  path = tmp_path / "list.pth"

  def loaded(value):
    path.write_bytes(legacy(value))
    return torch_annotations.load(path)

  for dtype in ("<i2", ">i4", "u1", "<f4", ">f8"):
    value = np.array([[1, 2], [3, 250 if dtype == "u1" else 300]], dtype)
    assert torch_annotations.numbers(loaded(value)) == value.ravel().tolist()
  assert loaded([np.float32(2.5), np.int64(-3)]) == [2.5, -3]
  for value in (np.array([1j]), np.array([None]), np.array(["a"]), {1: 2}, "1234", [1, "2"], None):
    assert torch_annotations.numbers(loaded(value)) is None
  for damage in (b"PK\x03\x04 cut", legacy([1] * 50)[:70], b"", b"\x80\x02}."):
    path.write_bytes(damage)
    with pytest.raises(ValueError, match="list.pth"):
      torch_annotations.load(path)


def json_source(tmp_path, entries, split="train", data="jsonl", **changes):
  if data == "jsonl":
    write_jsonl(tmp_path, entries)
  else:
    (tmp_path / "train.json").write_text(json.dumps(entries))
    (tmp_path / "a.png").write_bytes(png(painted(40, 60, red=(10, 10, 30, 30))))
  return grounding_lib.get(config(f"tiny,data={data},root={tmp_path}", **changes).data, split)


def test_jsonl(tmp_path):
  entries = [
    {"image": "a.png", "text": "red", "box": [10, 10, 30, 30.5], "id": "first"},
    {"image": "b.png", "text": "blue"},
  ]
  source = json_source(tmp_path, entries, "val")
  assert source.expressions(0) == [{"id": "first", "text": "red", "box": (10, 10, 30, 30.5)}]
  assert source.expressions(1) == [{"id": "1", "text": "blue", "box": None}]
  with pytest.raises(
    ValueError, match="train.jsonl, line 2: key 'box' is missing; it has image, text; name it with"
  ):
    json_source(tmp_path, entries)
  with pytest.raises(
    ValueError, match="train.jsonl, line 2: it has no box; a training expression needs one"
  ):
    json_source(tmp_path, [entries[0], entries[1] | {"box": None}])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"box": [30, 10, 10, 30]},
      "line 1: the box .* is empty; it should be .x1, y1, x2, y2. in pixels",
    ),
    ({"box": "all"}, "line 1: the box must be a list of four numbers"),
    ({"text": None}, "line 1: text must be a string"),
  ],
)
def test_unusable_jsonl(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    json_source(tmp_path, [{"image": "a.png", "text": "red", "box": [1, 1, 3, 3]} | changes])


WRONG_BOXES = [
  [30, 10, 10, 30],
  [10, 10, 10, 30],
  [1, 2, 3],
  [1, 2, 3, 4, 5],
  [1, 2, float("nan"), 4],
  [1, 2, float("inf"), 4],
  [1, 2, "3", 4],
  "all",
]


@pytest.mark.parametrize("box", WRONG_BOXES, ids=str)
def test_one_unusable_box_among_others_is_counted_and_named(tmp_path, caplog, box):
  good = {"image": "a.png", "text": "red", "box": [1, 1, 3, 3]}
  entries = [good, good | {"box": box, "text": "blue", "id": "b"}, good]
  source = json_source(tmp_path, entries)
  assert [[e["id"] for e in source.expressions(i)] for i in range(len(source))] == [["0"], ["2"]]
  assert source.bad.count == 1
  (warning,) = caplog.messages
  assert warning.startswith(f"{tmp_path}/train.jsonl, line 2: the box")
  assert warning.endswith(" It is left out.")
  with pytest.raises(RecordError, match="train.jsonl, line 2: the box"):
    json_source(tmp_path, entries, data__strict=True)

  caplog.clear()
  source = json_source(tmp_path, entries, "val")  # results need a box for every expression
  assert [e["box"] is None for i in range(3) for e in source.expressions(i)] == [False, True, False]
  assert caplog.messages[0].endswith(" Its expression is located, but does not count.")
  with pytest.raises(RecordError, match="val.jsonl, line 2: the box"):
    json_source(tmp_path, entries, "val", data__strict=True)


def test_records_know_the_line_of_each_expression(tmp_path):
  good = {"image": "a.png", "text": "red", "box": [1, 1, 3, 3]}
  source = json_source(tmp_path, [good] * 40, data__expressions_per_image=4)
  assert [e["location"] for e in source[0]["expressions"]] == [
    (f"{tmp_path}/train.jsonl", f"line {number}") for number in range(1, 41)
  ]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_file_without_a_usable_box_is_an_error_even_beside_another_file(tmp_path, split):
  bad = {"image": "a.png", "text": "red", "box": [30, 10, 10, 30]}
  message = "line 1: the box .* None of the boxes of .*jsonl can be used"
  with pytest.raises(ValueError, match=message):
    json_source(tmp_path, [bad, bad, bad], split)
  if split == "train":
    (tmp_path / "good.jsonl").write_text(json.dumps(bad | {"box": [1, 1, 3, 3]}) + "\n")
    files = (f"{tmp_path}/good.jsonl", f"{tmp_path}/train.jsonl")
    with pytest.raises(ValueError, match=f"{tmp_path}/train.jsonl, {message}"):
      json_source(tmp_path, [bad], data__train_files=files)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(flags=st.lists(st.booleans(), min_size=1, max_size=40).filter(any), grouped=st.booleans())
def test_every_entry_is_either_in_the_source_or_counted(flags, grouped):
  with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
    patch.setattr(logging, "warning", lambda *unused: None)
    box = {True: [1, 1, 3, 3], False: [3, 3, 1, 1]}
    entries = [{"image": "a.png", "text": str(i), "box": box[good]} for i, good in enumerate(flags)]
    count = 8 if grouped else 1
    source = json_source(pathlib.Path(folder), entries, data__expressions_per_image=count)
    read = [e["text"] for i in range(len(source)) for e in source.expressions(i)]
  assert read == [str(i) for i, good in enumerate(flags) if good]
  assert source.bad.count == flags.count(False)


def test_refcoco_json(tmp_path):
  entries = [
    {
      "file_name": "a.png",
      "bbox": [10, 10, 20, 20],
      "ref_id": 7,
      "sentences": [{"sent": "the man"}, "he"],
    }
  ]
  source = json_source(tmp_path, entries, data="refcoco", data__expressions_per_image=4)
  assert source.expressions(0) == [
    {"id": number, "text": text, "box": (10, 10, 30, 30)}
    for number, text in (("7-0", "the man"), ("7-1", "he"))
  ]
  with pytest.raises(ValueError, match="train.json, entry 1: sentences must be a list"):
    json_source(tmp_path, [entries[0] | {"sentences": "the man"}], data="refcoco")
  with pytest.raises(ValueError, match="train.json, entry 1: image must be a string"):
    json_source(tmp_path, [{"bbox": [1, 1, 2, 2], "sentences": ["x"]}], data="refcoco")


def test_unknown_names_are_listed(tmp_path):
  with pytest.raises(
    ValueError, match="data.name is 'coco'; known sources: scenes, transvg, jsonl, refcoco"
  ):
    grounding_lib.get({"name": "coco"}, "train")
  with pytest.raises(ValueError, match="Split 'testA' does not exist"):
    grounding_lib.get({"name": "jsonl"}, "testA")
  with pytest.raises(ValueError, match="data.dataset='coco' is not one of unc, .*vg_uni"):
    grounding_lib.get(config("large,data=transvg,dataset=coco").data, "train")
  with pytest.raises(
    FileNotFoundError,
    match="unc_testB.pth does not exist; check data.split_root, data.dataset and data.test_name",
  ):
    grounding_lib.get(
      config(f"large,data=transvg,root={tmp_path}", data__test_name="testB").data, "test"
    )
  with pytest.raises(ValueError, match="data='coco' is unknown"):
    config("small,data=coco")


def test_chunks_have_every_expression_once():
  source = grounding_lib.ExpressionRecords(
    [
      {
        "image": f"{i}.png",
        "image_id": str(i),
        "expressions": [expression(number=f"{i}-{n}") for n in range(count)],
      }
      for i, count in enumerate([3, 1, 0, 4, 2])
    ]
  )
  for size in (1, 2, 3, 5):
    chunked = Chunked(source, size, "expressions")
    rows = [chunked[i]["expressions"] for i in range(len(chunked))]
    assert rows == [chunked.expressions(i) for i in range(len(chunked))]
    assert max(map(len, rows)) <= size
    assert [e["id"] for row in rows for e in row] == [
      f"{i}-{n}" for i, count in enumerate([3, 1, 0, 4, 2]) for n in range(count)
    ]
