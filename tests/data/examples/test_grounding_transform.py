"""Examples of grounding: augmentation, location tokens, padding."""

import pickle

import numpy as np
import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug_jax.data import boxes
from mplug_jax.data.errors import ImageError, RecordError
from mplug_jax.data.examples import grounding
from tests.support.grounding_case import (
  AUGMENT,
  BOS,
  EOS,
  PAD,
  WordTokenizer,
  expression,
  record,
  rng,
  transform,
)
from tests.support.grounding_files import config, frame_of

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


def test_boxes_are_clipped():
  example = transform()(0, record(expression(box=(-5.0, 30.0, 15.0, 99.0))), rng())
  corners = boxes.to_corners(example["box"][0]) * 32 - np.tile(example["placed"][:2], 2)
  np.testing.assert_allclose(corners, [0, 30 * 21 / 40, 15 * 32 / 60, 21], atol=1e-4)


OUTSIDE = [
  (70.0, 1.0, 80.0, 5.0),
  (60.0, 0.0, 61.0, 40.0),  # touches the edge
  (-9.0, -9.0, 0.0, 0.0),
  (1.0, 40.0, 5.0, 90.0),
]


@pytest.mark.parametrize("box", OUTSIDE)
@pytest.mark.parametrize("train", [True, False])
def test_a_box_outside_its_image_is_counted_named_and_not_valid(caplog, box, train):
  outside = expression(box=box) | {"location": ("train.jsonl", "line 2")}
  make = transform(train=train)
  example = make(0, record(outside, expression("two")), rng() if train else None)
  np.testing.assert_array_equal(example["valid"], [False, True])
  assert not example["box"][0].any()
  assert not example["corrupt"]
  assert example["image"].any()
  assert example["phrase"][0, 0] == BOS  # results need a box for every phrase
  (warning,) = caplog.messages
  numbers = ", ".join(f"{x:g}" for x in box)
  assert warning.startswith(
    f"train.jsonl, line 2, id 1: the box ({numbers}) of 'the red one' lies outside its image of "
    "60 x 40 pixels, picture-1. "
  )
  with pytest.raises(RecordError, match="line 2, id 1: the box .* lies outside its image"):
    transform(train=train, strict=True)(0, record(outside), rng() if train else None)


def test_only_the_first_ten_boxes_outside_are_named(caplog):
  make = transform()
  for number in range(25):
    make(number, record(expression(box=OUTSIDE[0], number=str(number))), rng())
  assert len(caplog.messages) == 10
  assert caplog.messages[9].startswith("Id 9: the box")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(*[st.floats(-80, 80)] * 2, *[st.floats(1, 80)] * 2), min_size=1))
def test_every_box_is_either_valid_or_counted(rows):
  corners = [(x, y, x + width, y + height) for x, y, width, height in rows]
  make = transform(train=False, expressions_per_image=len(corners))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(logging, "warning", lambda *unused: None)
    example = make(0, record(*(expression(box=box) for box in corners)), None)
  shown = [x1 < 60 and y1 < 40 and x2 > 0 and y2 > 0 for x1, y1, x2, y2 in corners]
  np.testing.assert_array_equal(example["valid"], shown)
  assert make.bad.count == shown.count(False)


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
