"""Classification examples: official files, user files, scenes, text assignment, augmentation."""

import json
import re

import numpy as np
import pytest

from mplug_jax.data.errors import RecordError
from mplug_jax.data.examples import classification
from mplug_jax.data.images import reader
from tests.support import classification_run
from tests.support.classification_case import WORDS, data_config, words

PAD = 9
BOS = 7


class WordTokenizer:
  """One token per word; ids from 100, except the special ones, which differ from BERT's."""

  pad_id = PAD
  bos_id = BOS
  eos_id = 8

  def encode(self, text):
    return [BOS, *(100 + WORDS.index(word) for word in text.split())]


def transform(**options):
  return classification.ClassificationTransform(
    WordTokenizer(),
    reader.ImageReader(8),
    **{"labels": ("no", "yes"), "max_words": 30, "max_text": 8, **options},
  )


LEFT, RIGHT = (np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3) + shift for shift in (0, 50))
RECORD = {
  "images": [LEFT, RIGHT],
  "id": 3,
  "sentence": "Only the LEFT image shows a leftmost cat!",
  "label": "yes",
}


# ---- examples


def test_example_of_one_record():
  example = transform()(5, RECORD, None)
  assert {key: (value.shape, value.dtype.name) for key, value in example.items()} == {
    "image": ((2, 8, 8, 3), "uint8"),
    "sentence": ((1, 8), "int32"),
    "label": ((1,), "int32"),
    "corrupt": ((), "bool"),
    "index": ((), "int32"),
  }
  np.testing.assert_array_equal(example["image"], [LEFT, RIGHT])
  assert example["sentence"][0, 0] == BOS
  assert words(example["sentence"]) == "only the left image shows a leftmost"
  assert example["label"] == 1
  assert not example["corrupt"]
  assert example["index"] == 5
  assert words(transform(max_words=3)(0, RECORD, None)["sentence"]) == "only the left"
  assert transform()(0, RECORD | {"label": ""}, None)["label"] == -1
  empty = transform()(0, RECORD | {"sentence": ""}, None)["sentence"]
  np.testing.assert_array_equal(empty, [[BOS] + [PAD] * 7])


def test_one_unreadable_image_makes_the_row_corrupt():
  example = transform()(0, RECORD | {"images": [LEFT, b"nothing"]}, None)
  assert example["corrupt"]
  assert not example["image"][1].any()
  np.testing.assert_array_equal(example["image"][0], LEFT)


def test_swap_exchanges_images_and_whole_words_in_training():
  make = transform(swap=1.0, max_text=9)
  kept = json.dumps(RECORD["sentence"])
  example = make(0, RECORD, np.random.default_rng(0))
  np.testing.assert_array_equal(example["image"], [RIGHT, LEFT])
  assert words(example["sentence"]) == "only the right image shows a leftmost cat"
  assert example["label"] == 1
  assert RECORD["images"][0] is LEFT
  assert json.dumps(RECORD["sentence"]) == kept
  plain = make(0, RECORD | {"sentence": "a cat"}, np.random.default_rng(0))
  np.testing.assert_array_equal(plain["image"], [RIGHT, LEFT])
  assert words(plain["sentence"]) == "a cat"
  evaluated = make(0, RECORD, None)
  np.testing.assert_array_equal(evaluated["image"], [LEFT, RIGHT])
  assert words(evaluated["sentence"]) == "only the left image shows a leftmost cat"


def test_swap_has_its_probability_and_changes_words_and_images_together():
  make = transform(swap=0.5)
  swapped = []
  for seed in range(400):
    example = make(0, RECORD, np.random.default_rng(seed))
    swapped.append((example["image"][0] == RIGHT).all())
    assert ("right" in words(example["sentence"]).split()) == swapped[-1]
  assert 160 < sum(swapped) < 240


def test_mirror_changes_images_order_and_words():
  make = transform(mirror=1.0)
  example = make(0, RECORD, np.random.default_rng(0))
  np.testing.assert_array_equal(example["image"], [RIGHT[:, ::-1], LEFT[:, ::-1]])
  assert words(example["sentence"]).startswith("only the right image")
  single = make(0, RECORD | {"images": [LEFT]}, np.random.default_rng(0))
  np.testing.assert_array_equal(single["image"], [LEFT[:, ::-1]])
  np.testing.assert_array_equal(make(0, RECORD, None)["image"], [LEFT, RIGHT])


def test_further_sentences_are_drawn_in_training_and_swapped_like_the_first():
  def more(rng, count):
    assert isinstance(rng, np.random.Generator)
    return [("a left cat", "no"), ("a cat", "yes")][:count]

  make = transform(sentences=3, swap=1.0)
  record = RECORD | {"more": more}
  example = make(0, record, np.random.default_rng(0))
  assert list(map(words, example["sentence"])) == [
    "only the right image shows a leftmost",
    "a right cat",
    "a cat",
  ]
  np.testing.assert_array_equal(example["label"], [1, 0, 1])
  assert make(0, record, None)["sentence"].shape == (1, 8)
  few = transform(sentences=4)(
    0, record, np.random.default_rng(0)
  )  # as many as there are; the rest does not count
  np.testing.assert_array_equal(few["label"], [1, 0, 1, -1])
  with pytest.raises(ValueError, match="config.data.sentences_per_row=3 needs generated scenes"):
    make(0, RECORD, np.random.default_rng(0))


# ---- official files and user files


@pytest.fixture(scope="module")
def nlvr2(tmp_path_factory):
  return classification_run.write_nlvr2(tmp_path_factory.mktemp("nlvr2"))


def test_official_nlvr2_rows(nlvr2):
  data = data_config("nlvr2", f"base,data=nlvr2,root={nlvr2}")
  train, test = (classification.get_source(data, split) for split in ("train", "test"))
  assert train[1] == {
    "images": [f"{nlvr2}/train/train-1-img{i}.png" for i in (0, 1)],
    "id": 1,
    "label": "True",
    "sentence": "The left image shows a red cat.",
  }
  assert test[0]["images"][1] == f"{nlvr2}/test/test-0-img1.png"
  assert test.row(0) == {
    "id": 0,
    "label": "False",
    "sentence": "The left image shows a green cat.",
  }
  assert list(classification.texts(train, 2))[0] == "the left image shows a green cat"
  assert len(list(classification.texts(train))) == 9


def test_official_snli_ve_rows(tmp_path):
  classification_run.write_image(tmp_path / "flickr30k-images" / "47.jpg")
  (tmp_path / "ve_dev.json").write_text(
    json.dumps([{"image": "47", "sentence": "A dog.", "label": "entailment"}])
  )
  data = data_config("snli_ve", f"large,data=snli_ve,root={tmp_path}")
  assert classification.get_source(data, "val")[0] == {
    "images": [f"{tmp_path}/flickr30k-images/47.jpg"],
    "id": 0,
    "sentence": "A dog.",
    "label": "entailment",
  }
  assert data.labels.index("entailment") == 2
  assert data.labels.index("contradiction") == 0


def test_custom_labels_and_missing_labels_outside_training(tmp_path):
  classification_run.write_image(tmp_path / "a.png")
  lines = [
    {"image": "a.png", "sentence": "s", "label": True, "id": "x"},
    {"image": "a.png", "sentence": "t", "label": 3},
  ]
  (tmp_path / "train.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
  (tmp_path / "val.jsonl").write_text('{"image": "a.png", "sentence": "u"}')
  data = data_config("snli_ve", f"data=jsonl,root={tmp_path},labels=3/True")
  train = classification.get_source(data, "train")
  assert [(train[i]["label"], train[i]["id"]) for i in (0, 1)] == [("True", "x"), ("3", 1)]
  assert classification.get_source(data, "val")[0]["label"] == ""
  assert train.groups(0) == ()


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (
      {"sentence": "s", "label": "no"},
      "train.jsonl, line 1: key 'images' is missing; it has sentence, label; name it with "
      "--config.data.fields=images=...",
    ),
    (
      {"images": ["a.png"], "label": "no"},
      "line 1: key 'sentence' is missing; it has images, label; name it with",
    ),
    (
      {"images": ["a.png", "a.png"], "sentence": "s"},
      "line 1: key 'label' is missing; it has images, sentence; name it with",
    ),
    (
      {"images": ["a.png", "a.png"], "sentence": 5, "label": "no"},
      "line 1: sentence must be a string.",
    ),
    (
      {"images": ["a.png"], "sentence": "s", "label": "no"},
      "line 1: images names 1 images, but config.data.images_per_text is 2.",
    ),
    (
      {"images": [1, 2], "sentence": "s", "label": "no"},
      "line 1: images must be a string or a list of strings.",
    ),
    (
      {"images": ["a.png", "a.png"], "sentence": "s", "label": "maybe"},
      "line 1: label 'maybe' is not one of config.data.labels, no, yes.",
    ),
    (
      {"images": ["a.png", "b.png"], "sentence": "s", "label": "no"},
      "b.png does not exist; check data.image_root.",
    ),
  ],
)
def test_bad_entries_are_named(tmp_path, line, message):
  classification_run.write_image(tmp_path / "a.png")
  (tmp_path / "train.jsonl").write_text(json.dumps(line))
  with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as error:
    classification.get_source(
      data_config("nlvr2", f"data=jsonl,root={tmp_path},labels=no/yes"), "train"
    )
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("label", ["maybe", "", 3, None])
def test_one_unknown_label_is_counted_and_named(tmp_path, caplog, label):
  classification_run.write_image(tmp_path / "a.png")
  good = {"images": ["a.png", "a.png"], "sentence": "s", "label": "no"}
  bad = good | {"label": label, "sentence": "t"}
  for split in ("train", "val"):
    (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, [good, bad, good])))
  c = data_config("nlvr2", f"data=jsonl,root={tmp_path},labels=no/yes")
  source = classification.get_source(c, "train")
  assert [source.row(i)["sentence"] for i in range(len(source))] == ["s", "s"]
  (message,) = caplog.messages
  assert message.startswith(f"{tmp_path}/train.jsonl, line 2: label {str(label)!r} is not one of")
  if label is not None:  # null means unknown in splits that are evaluated
    source = classification.get_source(c, "val")
    assert [source.row(i)["label"] for i in range(len(source))] == ["no", "", "no"]
    assert caplog.messages[1].endswith(" It is classified, but does not count.")
  c = c.copy_and_resolve_references().unlock()
  c.strict = True
  with pytest.raises(RecordError, match="line 2: label"):
    classification.get_source(c, "train")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"data__name": "coco"},
      "config.data.name='coco' is not one of nlvr2, snli_ve, jsonl, captions, scenes, "
      "scene_captions",
    ),
    ({"data__labels": ("yes",)}, "config.data.labels=('yes',) must list the classes: at least two"),
    (
      {"data__labels": ("yes", "no", "yes")},
      "must list the classes: at least two, none of them twice",
    ),
    (
      {"data__images_per_text": 3},
      "config.data.images_per_text=3 must be 1 or 2 for generated scenes",
    ),
  ],
)
def test_bad_settings_are_named(changes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    classification.get_source(data_config("nlvr2", "tiny", **changes), "train")
  with pytest.raises(ValueError, match="Split 'dev' does not exist"):
    classification.get_source(data_config("nlvr2", "tiny"), "dev")
