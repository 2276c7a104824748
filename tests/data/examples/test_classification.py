"""Classification examples: official files, user files, scenes, text assignment, augmentation."""

import collections
import json
import re

import numpy as np
import pytest

from mplug_jax.data.examples import classification
from mplug_jax.data.images import reader
from mplug_jax.data.sources import text_assignment
from mplug_jax.scenes import oracle
from mplug_jax.scenes import pairs as scene_pairs
from mplug_jax.scenes import scene as scenes
from mplug_jax.scenes import statements as scene_statements
from mplug_jax.scenes import text as scene_text
from tests.support import classification_run

PAD = 9
BOS = 7
WORDS = ["only", "the", "left", "right", "leftmost", "image", "shows", "a", "cat"]


class WordTokenizer:
  """One token per word; ids from 100, except the special ones, which differ from BERT's."""

  pad_id = PAD
  bos_id = BOS
  eos_id = 8

  def encode(self, text):
    return [BOS, *(100 + WORDS.index(word) for word in text.split())]


def words(row):
  return " ".join(WORDS[i - 100] for i in np.ravel(row) if i >= 100)


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


def data_config(file, arg, **changes):
  return classification_run.config(file, arg, **changes).data


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


# ---- scenes


@pytest.mark.parametrize(
  ("file", "labels", "subsets"),
  [
    ("snli_ve", set(scene_pairs.LABELS), {"side", "height", "size"}),
    (
      "nlvr2",
      {"True", "False"},
      {
        "object",
        "relation",
        "count",
        "both",
        "one",
        "left_only",
        "right_only",
        "any",
        "neither",
        "more_left",
        "more_right",
        "same",
        "two",
        "three",
      },
    ),
  ],
)
def test_scenes_have_labels_and_subsets_without_their_pixels(file, labels, subsets):
  data = data_config(file, "tiny")
  source = classification.get_source(data, "test")
  assert len(source) == 1000
  for index in (0, 7):
    record = source[index]
    assert {
      name: value for name, value in record.items() if name not in ("images", "more")
    } == source.row(index)
    assert len(record["images"]) == data.images_per_text
    assert record["images"][0].shape == (
      48,
      48,
      3,
    )
  indices = range(0, 120)
  assert {source.row(i)["label"] for i in indices} == labels <= set(data.labels)
  assert set().union(*(source.groups(i) for i in indices)) == subsets | {"seen", "unseen"}


_COLORS = {"violet": "purple"} | {name: name for name in scenes.COLORS}
_SHAPES = {"disc": "circle"} | {name: name for name in scenes.SHAPES}
_RELATIONS = sorted(
  ((phrase, name) for name, phrases in scene_text.PHRASES.items() for phrase in phrases),
  key=lambda x: -len(x[0]),
)


def described(text):
  """ "a violet disc" or "red things" -> Desc."""
  words = [
    word if word in _COLORS or word in _SHAPES else word.removesuffix("s") for word in text.split()
  ]
  return scene_text.Desc(
    color=next((_COLORS[w] for w in words if w in _COLORS), None),
    shape=next((_SHAPES[w] for w in words if w in _SHAPES), None),
  )


def claimed(text):
  """ "a disc above a star" or "a red star" -> Statement."""
  for phrase, name in _RELATIONS:
    if f" {phrase} " in text:
      first, second = text.split(f" {phrase} ", 1)
      return scene_text.Statement((described(first), described(second)), ((name, 0, 1),))
  return scene_text.Statement((described(text),))


def pair_form(text):
  """Parses a statement about two images by its template."""
  if match := re.fullmatch("the (left|right) image shows (no|two|three) (.*)", text):
    return f"{match[1]} number", (("no", "", "two", "three").index(match[2]), described(match[3]))
  if match := re.fullmatch("the (left|right) image shows (.*)", text):
    return match[1], claimed(match[2])
  for kind, content, template in scene_pairs.PAIR_TEMPLATES:
    if match := re.fullmatch(template.format(x="(.*)"), text):
      return kind, described(match[1]) if content == "count" else claimed(match[1])
  raise AssertionError(text)


def judged_pair(text, left, right):
  kind, form = pair_form(text)
  if kind in ("left number", "right number"):
    return len(scene_text.matching(left if kind == "left number" else right, form[1])) == form[0]
  if kind in ("left", "right"):  # both images show it if the one does that is asked about
    only = left if kind == "left" else right
    return oracle.judge_pair(("both", form), only, only)
  return oracle.judge_pair((kind, form), left, right)


def judged_hypothesis(text, scene):
  if match := re.fullmatch(r"the (\w+) is (\w+)", text):
    of_shape, right = (
      {o for o in scene.objects if (o.shape, o.color) in pairs}
      for pairs in (
        [(_SHAPES[match[1]], color) for color in scenes.COLORS],
        [(_SHAPES[match[1]], _COLORS[match[2]])],
      )
    )
    return (
      "neutral" if not of_shape else {len(of_shape): "entailment", 0: "contradiction"}[len(right)]
    )
  if text.endswith(" the middle"):
    middle = scenes.Object("", "", "middle", (scene.config.size / 2,) * 4, 0, ())
    scene = scene._replace(objects=(*scene.objects, middle))
  form = claimed(text.replace(" is ", " "))
  if text.endswith(" the middle"):
    form = form._replace(objects=(form.objects[0], scene_text.Desc(shape="middle")))
  assert not any(desc.held_out for desc in form.objects)
  return oracle.judge_entailment(form, scene)


def test_search_for_statements_ends_for_equal_images():
  scene = scenes.scene(scenes.SceneConfig(96), "train", 5)
  statements = scene_statements.pair_statements(np.random.default_rng(0), scene, scene, 3)
  assert len(statements) <= 3
  assert all(judged_pair(text, scene, scene) == (label == "True") for text, label in statements)


def test_further_statements_have_right_labels_and_name_no_held_out_pair():
  """The statements are parsed by this test, and judged by the oracle."""
  config = scenes.SceneConfig(96)
  rng = np.random.default_rng(0)
  labels = collections.Counter()
  for index in range(60):
    left = scenes.scene(config, "train", index)
    right = scenes.scene(config, "train", index + 100)
    for text, label in scene_statements.pair_statements(rng, left, right, 4):
      assert judged_pair(text, left, right) == (label == "True"), text
      kind, form = pair_form(text)
      related = getattr(form, "relations", ())
      labels[
        label,
        kind.split()[-1]
        if kind in ("left number", "right number")
        else f"of one image{' related' * bool(related)}"
        if kind in ("left", "right")
        else "of both",
      ] += 1
    for text, label in scene_statements.hypotheses(rng, left, 4):
      assert judged_hypothesis(text, left) == label, text
      labels[label, "relation" if len(text.split()) > 5 else "color"] += 1
  assert min(labels.values()) > 5, labels
  assert len(labels) == 2 * 4 + 3 * 2, labels


# ---- text assignment


class Captions:
  """Image i is the number i; images 2 k and 2 k + 1 have one id and the same two captions."""

  def __len__(self):
    return 12

  def __getitem__(self, index):
    return {
      "image": index,
      "image_id": index // 2,
      "captions": [f"{index // 2} a", f"{index // 2} b"],
    }


def test_text_assignment_pairs_two_images_with_a_text():
  cases = dict.fromkeys(("first", "second", "neither"), 0)
  for seed in range(100):
    source = text_assignment.TextAssignment(Captions(), tuple(cases), seed)
    for index in range(len(source)):
      record = source[index]
      first, second = (image // 2 for image in record["images"])
      described = int(record["sentence"].split()[0])
      cases[record["label"]] += 1
      assert first != second
      assert index // 2 in (first, second)
      assert {
        "first": described == first,
        "second": described == second,
        "neither": described not in (first, second),
      }[record["label"]]
      assert record == source[index]
      assert {k: v for k, v in record.items() if k != "images"} == source.row(index)
  assert all(330 < count < 470 for count in cases.values())  # of 1200
  assert len({source.row(i)["sentence"][-1] for i in range(12)}) == 2


def test_text_assignment_from_files_and_from_scenes(tmp_path):
  for name in "abc":
    classification_run.write_image(tmp_path / f"{name}.png")
  rows = [
    {"image": f"{name}.png", "caption": name if name == "a" else [name, name]} for name in "abc"
  ]
  (tmp_path / "train.json").write_text(json.dumps(rows))
  data = data_config("nlvr2", f"base,data=captions,root={tmp_path}")
  record = classification.get_source(data, "train")[0]
  images = [path.removeprefix(f"{tmp_path}/").removesuffix(".png") for path in record["images"]]
  assert {"first": images[0], "second": images[1], "neither": (set("abc") - set(images)).pop()}[
    record["label"]
  ] == record["sentence"]
  scenes = classification.get_source(data_config("nlvr2", "tiny,data=scene_captions"), "val")
  assert {scenes.row(i)["label"] for i in range(20)} == {"first", "second", "neither"}
  assert scenes[3]["images"][1].shape == (48, 48, 3)
  for content, message in (
    ([{"image": "a.png", "caption": []}], "entry 1: the list of captions is empty."),
    (rows[:2], "needs at least three captioned images, and the data has 2."),
  ):
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(message)):
      classification.get_source(data, "train")
  with pytest.raises(ValueError, match="must be three for text assignment"):
    text_assignment.TextAssignment(Captions(), ("yes", "no"), 0)
  with pytest.raises(IndexError, match="record 12 is not among the 12"):
    text_assignment.TextAssignment(Captions(), ("a", "b", "c"), 0)[12]
