"""Referring expressions: official lists, JSON files and scenes as records; examples."""

import json
import pickle

import numpy as np
import pytest
from absl import logging

from mplug_jax.data import boxes
from mplug_jax.data.errors import ImageError
from mplug_jax.data.examples import grounding
from mplug_jax.data.sources import grounding as grounding_lib
from mplug_jax.data.sources.chunked import Chunked
from mplug_jax.tensor_files import torch_annotations
from tests.support import torch_pickles
from tests.support.grounding_files import config, frame_of, legacy, painted, png, write_jsonl

# Unlike BERT's, to catch numbers written into the code
PAD = 9
BOS = 7
EOS = 8
AUGMENT = dict(
  long_sides=(1.0,),
  crop=0.0,
  official_crop=False,
  jitter=0.0,
  flip=0.0,
  position_words=(),
  official_words=False,
)


class WordTokenizer:
  """One token per word; ids from 100 in order of appearance."""

  pad_id = PAD
  bos_id = BOS
  eos_id = EOS

  def __init__(self):
    self.words = {}

  def encode(self, text):
    return [BOS, *(100 + self.words.setdefault(word, len(self.words)) for word in text.split())]


def transform(tokenizer=None, strict=False, **options):
  images = grounding.WholeImages(32, strict=strict)
  return grounding.GroundingTransform(
    tokenizer or WordTokenizer(),
    images,
    **{
      "size": 32,
      "expressions_per_image": 2,
      "max_phrase": 6,
      "train": True,
      "augment": AUGMENT,
      **options,
    },
  )


def expression(text="the red one", box=(10.0, 10.0, 30.0, 30.0), number="1"):
  return {"id": number, "text": text, "box": box}


def record(*expressions, image=None):
  image = painted(40, 60, red=(10, 10, 30, 30)) if image is None else image
  return {"image": image, "image_id": "picture-1", "expressions": list(expressions)}


def rng(seed=0):
  return np.random.default_rng(seed)


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


# ---- examples


def test_example_of_one_record():
  tokenizer = WordTokenizer()
  example = transform(tokenizer)(5, record(expression("The RED one")), rng())
  assert {key: (value.shape, value.dtype.name) for key, value in example.items()} == {
    "image": ((32, 32, 3), "uint8"),
    "placed": ((4,), "int32"),
    "size": ((2,), "int32"),
    "phrase": ((2, 6), "int32"),
    "box": ((2, 4), "float32"),
    "valid": ((2,), "bool"),
    "corrupt": ((), "bool"),
    "index": ((), "int32"),
  }
  np.testing.assert_array_equal(
    example["phrase"], [[BOS, 100, 101, 102, EOS, PAD], [PAD] * 6]
  )  # lower-cased
  np.testing.assert_array_equal(example["valid"], [True, False])
  assert tokenizer.words == {"the": 0, "red": 1, "one": 2}
  assert example["index"] == 5
  np.testing.assert_array_equal(example["size"], [60, 40])
  left, top, right, bottom = example["placed"]
  assert (right - left, bottom - top) == (32, 21)
  corners = boxes.to_corners(example["box"][0]) * 32
  np.testing.assert_allclose(corners, frame_of(example["image"], "red"), atol=1)


def test_training_draws_expressions_and_evaluation_leaves_none_out():
  many = record(*(expression(word) for word in ("one", "two", "three")))
  tokenizer = WordTokenizer()
  tokenizer.encode("one two three")
  make = transform(tokenizer)
  drawn = [set(make(0, many, rng(seed))["phrase"][:, 1]) for seed in range(60)]
  assert all(len(pair) == 2 for pair in drawn)
  assert set.union(*drawn) == {100, 101, 102}
  with pytest.raises(ValueError, match="3 expressions, more than the 2 of a row; wrap"):
    transform(tokenizer, train=False)(0, many, None)


def test_mirrored_images_have_mirrored_texts_and_boxes():
  tokenizer = WordTokenizer()
  tokenizer.encode("left right")
  make = transform(tokenizer, augment=AUGMENT | {"flip": 1.0})
  example = make(0, record(expression("left"), expression("right", (30.0, 0.0, 60.0, 40.0))), rng())
  np.testing.assert_array_equal(example["phrase"][:, 1], [101, 100])
  np.testing.assert_allclose(example["box"][:, 0], [1 - 20 / 60, 1 - 45 / 60], atol=1e-6)
  assert frame_of(example["image"], "red")[0] > 14
  still = transform(tokenizer, augment=AUGMENT | {"flip": 1.0}, train=False)(
    0, record(expression("left")), None
  )
  assert still["phrase"][0, 1] == 100
  assert still["box"][0, 0] == pytest.approx(20 / 60)


def test_long_and_empty_texts(monkeypatch):
  monkeypatch.setattr(logging, "warning", lambda *unused: None)
  example = transform()(0, record(expression("a b c d e f g"), expression("")), rng())
  np.testing.assert_array_equal(
    example["phrase"], [[BOS, 100, 101, 102, 103, EOS], [BOS, EOS, PAD, PAD, PAD, PAD]]
  )


def test_boxes_are_clipped_and_one_outside_is_an_error():
  example = transform()(0, record(expression(box=(-5.0, 30.0, 15.0, 99.0))), rng())
  corners = boxes.to_corners(example["box"][0]) * 32 - np.tile(example["placed"][:2], 2)
  np.testing.assert_allclose(corners, [0, 30 * 21 / 40, 15 * 32 / 60, 21], atol=1e-4)
  with pytest.raises(
    ValueError, match="the box .* of 'the red one' lies outside its image of 60 x 40 pixels"
  ):
    transform()(0, record(expression(box=(70.0, 1.0, 80.0, 5.0))), rng())


def test_an_unknown_box_is_not_valid():
  example = transform(train=False)(0, record(expression(box=None), expression("two")), None)
  np.testing.assert_array_equal(example["valid"], [False, True])
  assert not example["box"][0].any()
  assert example["box"][1].any()
  assert (example["phrase"][:, 0] == BOS).all()


def test_corrupt_images_carry_no_weight(tmp_path, monkeypatch):
  warnings = []
  monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
  (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
  broken = record(expression(), image=str(tmp_path / "broken.png"))
  for train in (True, False):
    example = transform(train=train)(3, broken, rng() if train else None)
    assert example["corrupt"]
    assert not any(example[key].any() for key in ("image", "box", "valid", "placed", "size"))
    assert (example["phrase"] == PAD).all() == train  # results need a box for every phrase
  assert "broken.png" in warnings[0]
  with pytest.raises(ImageError, match="broken.png"):
    transform(strict=True)(0, broken, rng())


def test_blank_images_keep_their_boxes():
  seen, blank = (
    transform(train=False, blank=flag)(0, record(expression()), None) for flag in (False, True)
  )
  assert seen["image"].any()
  assert not blank["image"].any()
  for key in ("box", "placed", "size", "phrase"):
    np.testing.assert_array_equal(seen[key], blank[key])


@pytest.mark.parametrize("sides", [(), (1.0, 1.1), (0.0,)])
def test_an_image_larger_than_the_canvas_is_an_error(sides):
  with pytest.raises(
    ValueError, match="config.data.augment.long_sides=.* must be shares of the canvas"
  ):
    grounding.make_transform(config(data__augment__long_sides=sides), WordTokenizer(), train=True)


def test_the_transform_can_be_pickled():
  make = transform()
  first = make(0, record(expression()), rng())
  copy = pickle.loads(pickle.dumps(make))(0, record(expression()), rng())
  for key in first:
    np.testing.assert_array_equal(copy[key], first[key])
