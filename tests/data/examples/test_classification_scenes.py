"""Statements about pairs of scenes and captions of scenes for entailment, and text assignment."""

import collections
import json
import re

import numpy as np
import pytest

from mplug_jax.data.examples import classification
from mplug_jax.data.sources import text_assignment
from mplug_jax.scenes import oracle
from mplug_jax.scenes import pairs as scene_pairs
from mplug_jax.scenes import scene as scenes
from mplug_jax.scenes import statements as scene_statements
from mplug_jax.scenes import text as scene_text
from tests.support import classification_run
from tests.support.classification_case import data_config


@pytest.fixture(scope="module")
def nlvr2(tmp_path_factory):
  return classification_run.write_nlvr2(tmp_path_factory.mktemp("nlvr2"))


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


def test_text_assignment_from_files_and_from_scenes(tmp_path, caplog):
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
  (tmp_path / "train.json").write_text(json.dumps([{"image": "a.png", "caption": []}, *rows]))
  assert len(classification.get_source(data, "train")) == 3
  assert caplog.messages[-1].endswith("entry 1: the list of captions is empty. It is left out.")
  with pytest.raises(ValueError, match="must be three for text assignment"):
    text_assignment.TextAssignment(Captions(), ("yes", "no"), 0)
  with pytest.raises(IndexError, match="record 12 is not among the 12"):
    text_assignment.TextAssignment(Captions(), ("a", "b", "c"), 0)[12]
