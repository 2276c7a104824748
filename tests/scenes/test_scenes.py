"""Procedural scenes: every text is checked against its scene, by the oracle or by arithmetic."""

import collections
import functools
import itertools
import re
import time

import numpy as np
import pytest

from mplug_jax.scenes import clips, oracle, rendering
from mplug_jax.scenes import pairs as scene_pairs
from mplug_jax.scenes import scene as scenes
from mplug_jax.scenes import text as scene_text
from mplug_jax.scenes.questions import FAMILIES, YES_NO_FAMILIES, SceneVqaSource, questions
from tests.support.scenes_case import (
  BOTH,
  DEFAULT,
  HARD,
  WORDS,
  attribute_words,
  form_words,
)


@functools.cache
def sample(config, split, count):
  return [scenes.scene(config, split, i) for i in range(min(count, scenes.split_size(split)))]


@functools.cache
def _asked(config, split, index):
  return questions(scenes.scene(config, split, index))


def asked(config, split, count):
  return [_asked(config, split, i) for i in range(count)]


@BOTH
def test_records_are_a_function_of_their_index(config, monkeypatch, made):
  monkeypatch.setattr(scenes, "scene", made.__wrapped__)  # makes every scene anew
  again = scenes.SceneConfig(config.size, 0, config.difficulty)
  for i in (0, 7, 999):
    a = scenes.scene(config, "test", i)
    b = scenes.scene(again, "test", i)
    assert a == b
    assert a is not b
    np.testing.assert_array_equal(rendering.render(a, config), rendering.render(b, again))
    assert scene_text.caption_forms(a) == scene_text.caption_forms(b)
    assert scene_text.captions(a, 6)[:5] == scene_text.captions(a)
    assert questions(a) == questions(b)
    assert scene_text.referring(a) == scene_text.referring(b)
    assert scene_pairs.pair(config, "test", i) == scene_pairs.pair(again, "test", i)
    assert scene_pairs.entailment(config, "test", i) == scene_pairs.entailment(again, "test", i)
    assert clips.clip(config, "test", i) == clips.clip(again, "test", i)


def test_splits_and_seeds_share_no_image():
  other = scenes.SceneConfig(seed=1)
  sets = [[s.objects for s in sample(DEFAULT, split, 1000)] for split in scenes.SPLITS]
  sets.append([s.objects for s in sample(other, "train", 1000)])
  everything = list(itertools.chain(*sets))
  assert len(set(everything)) == len(everything) == 4000
  assert [scenes.split_size(s) for s in ("train", "val", "test")] == [20_000, 1_000, 1_000]


@BOTH
def test_held_out_pairs_are_only_in_test(config):
  for split in ("train", "val"):
    assert not any(scene.unseen for scene in sample(config, split, 1000))
    for scene, asked_here in zip(sample(config, split, 1000), asked(config, split, 150)):
      for text in scene_text.captions(scene) + [q.text for q in asked_here]:  # nor in words
        named = attribute_words(text)
        assert not any((b, a) in scenes.HELD_OUT for a, b in itertools.pairwise(named)), text
  shown = collections.Counter(
    (o.shape, o.color) for s in sample(config, "test", 1000) for o in s.objects
  )
  assert set(shown) == set(itertools.product(config.shapes, config.colors))
  assert 0.25 < np.mean([s.unseen for s in sample(config, "test", 1000)]) < 0.6


@BOTH
def test_scene_geometry(config):
  fewest, most = (2, 4) if config is DEFAULT else (3, 6)
  assert config.size == (96 if config is DEFAULT else 128)
  worst = 0.0
  counts = set()
  for scene in sample(config, "train", 1000):
    counts.add(len(scene.objects))
    assert len({o[:3] for o in scene.objects}) == len(scene.objects)
    for a, b in itertools.combinations(scene.objects, 2):
      width = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
      height = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
      if width > 0 and height > 0:
        area = min((o.box[2] - o.box[0]) * (o.box[3] - o.box[1]) for o in (a, b))
        worst = max(worst, width * height / area)
    assert all(0 < x < config.size for o in scene.objects for x in o.box)
  assert counts == set(range(fewest, most + 1))
  assert worst == 0 if config is DEFAULT else 0.1 < worst <= 0.2
  areas = {
    s: [
      (o.box[2] - o.box[0]) * (o.box[3] - o.box[1])
      for scene in sample(config, "train", 1000)
      for o in scene.objects
      if (o.size, o.shape) == (s, "circle")
    ]
    for s in scenes.SIZES
  }
  assert min(areas["large"]) > 1.5 * max(areas["small"])


@BOTH
def test_boxes_are_tight_to_the_pixels(config):
  for scene in sample(config, "test", 60):
    empty = rendering.render(scene._replace(objects=()), config).astype(int)
    for o in scene.objects:
      alone = rendering.render(scene._replace(objects=(o,)), config)
      rows, columns = np.nonzero(np.abs(alone - empty).max(-1) > 8)
      assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == o.box, o
      x, y = (int(v) for v in o.center)
      np.testing.assert_array_equal(alone[y, x], o.rgb)
    image = rendering.render(scene, config)
    assert image.dtype == np.uint8
    assert image.shape == (config.size, config.size, 3)


@BOTH
def test_captions_are_true_and_varied(config):
  templates = set()
  openings = set()
  for scene in sample(config, "test", 150):
    captions = scene_text.caption_forms(scene, 6)
    assert len({c.text for c in captions}) == 6
    for c in captions:
      assert oracle.holds(c.form, scene) is True, (c, scene)
      assert sorted(attribute_words(c.text)) == sorted(form_words(c.form.objects)), c
      assert len(c.form.objects) in (2, 3)
      assert c.form.relations
      templates.add(c.template)
      openings.add(" ".join(w for w in c.text.split() if w not in WORDS))
  assert len(templates) == scene_text.TEMPLATE_COUNT >= 40
  assert len(openings) > 120


NOUN = r"(?:an? |the )((?:small|little|tiny|large|big)? ?(?:[a-z]+ )?(?:[a-z]+|plus sign))"
WAYS = {
  "left": r"(?:to the |on the )?left (?:side )?of",
  "right": r"(?:to the |on the )?right (?:side )?of",
  "above": "above|over",
  "below": "below|under|beneath",
}
SIMPLE = {name: re.compile(rf"{NOUN} is (?:{way}) {NOUN}") for name, way in WAYS.items()}


def read_relation(text, scene):
  """Returns the truth of "<noun> is <direction> <noun>" by arithmetic; None for other texts."""
  for name, pattern in SIMPLE.items():
    match = pattern.fullmatch(text)
    if match:
      first, second = (
        [o for o in scene.objects if set(attribute_words(noun)) <= set(o[:3])]
        for noun in match.groups()
      )
      axis = 0 if name in ("left", "right") else 1
      sign = -1 if name in ("left", "above") else 1
      return any(sign * (a.center[axis] - b.center[axis]) > 0 for a in first for b in second)
  return None


def test_words_agree_with_plain_arithmetic():
  """The oracle reads forms; this test reads the words."""
  read = collections.Counter()
  for scene, asked_here in zip(sample(HARD, "train", 300), asked(HARD, "train", 300), strict=True):
    for text in scene_text.captions(scene):
      value = read_relation(text, scene)
      read["captions"] += value is not None
      assert value in (True, None), (text, scene)
    for q in asked_here:
      if q.family == "relation":
        match = re.fullmatch(rf"is {NOUN} ({'|'.join(WAYS.values())}) {NOUN}\?", q.text)
        first, way, second = match.groups()
        value = read_relation(f"the {first} is {way} the {second}", scene)
        assert value == (q.answer == "yes"), (q, scene)
        read["relation"] += 1
      if q.family == "count":
        word = attribute_words(q.text)[0]
        assert int(q.answer) == sum(word in o[:3] for o in scene.objects)
        read["count"] += 1
  for i in range(150):
    triple = scene_pairs.entailment(HARD, "train", i)
    value = read_relation(triple.text, triple.premise)
    if triple.label != "neutral" and value is not None:
      assert value == (triple.label == "entailment")
      read["entailment"] += 1
  assert min(read.values()) > 30, read
  assert len(read) == 4, read


@BOTH
def test_answers_agree_with_the_oracle_and_families_are_balanced(config):
  answers = collections.defaultdict(collections.Counter)
  sampled = sample(config, "train", 2000)
  for scene, asked_here in zip(sampled, asked(config, "train", 2000), strict=True):
    assert len({q.text for q in asked_here}) == len(asked_here) == 8
    for q in asked_here:
      assert oracle.answer(q.form, scene) == q.answer, (q, scene)
      assert sorted(attribute_words(q.text)) == sorted(form_words(q.form)), q
      answers[q.family][q.answer] += 1
  assert set(answers) == set(FAMILIES)
  assert len(answers) >= 8
  for family, counts in answers.items():
    total = sum(counts.values())
    assert total > 500, family
    if family in YES_NO_FAMILIES:
      assert set(counts) == {"yes", "no"}, family
      assert 0.45 <= counts["yes"] / total <= 0.55, family
    else:
      assert max(counts.values()) / total <= 0.30, (family, counts)


def test_answers_from_the_question_alone_are_near_chance():
  """Majority answer for each text seen at least 5 times in 2,000 images, else the family's."""
  texts, families = (collections.defaultdict(collections.Counter) for _ in range(2))
  for asked_here in asked(DEFAULT, "train", 2000):
    for q in asked_here:
      texts[q.text][q.answer] += 1
      families[q.family][q.answer] += 1
  hits = collections.defaultdict(list)
  for asked_here in asked(DEFAULT, "val", 1000):
    for q in asked_here:
      seen = texts[q.text] if texts[q.text].total() >= 5 else families[q.family]
      hits[q.family].append(seen.most_common(1)[0][0] == q.answer)
  for family, values in hits.items():
    assert np.mean(values) < (0.57 if family in YES_NO_FAMILIES else 0.35), family


@BOTH
def test_referring_expressions(config):
  kinds = collections.Counter()
  for scene in sample(config, "test", 200):
    for r in scene_text.referring(scene, 3):
      target = scene.objects[r["target"]]
      head = r["form"].objects[0]
      assert oracle.locate(r["form"], scene) == r["box"] == target.box
      assert sorted(attribute_words(r["text"])) == sorted(form_words(r["form"].objects))
      assert any(
        o is not target and (o.shape == target.shape or o.color == target.color)
        for o in scene.objects
      )
      heads = [o for o in scene.objects if all(w is None or w in o[:3] for w in head)]
      assert (len(heads) > 1) == r["needs_relation"] == bool(r["form"].relations)
      kinds[r["needs_relation"]] += 1
  assert kinds[True] == kinds[False]


def test_attainable_scores(monkeypatch):
  monkeypatch.setattr(oracle, "consistency", functools.cache(oracle.consistency))
  scores = oracle.attainable(DEFAULT, "test", 60)
  for task in ("vqa", "grounding", "nlvr2", "entailment"):
    assert scores[task] == 100.0
  table = oracle.consistency(DEFAULT, "test", 60)
  sampled = sample(DEFAULT, "test", 60)
  for row, column in itertools.product(range(0, 300, 7), range(60)):  # without the index of words
    form = scene_text.caption_forms(sampled[row // 5])[row % 5].form
    assert table[row, column] == (oracle.holds(form, sampled[column]) is True)
  assert scores["text_to_image_r1"] == pytest.approx(100 * np.mean(1 / table.sum(1)))
  assert scores["text_to_image_r1"] < scores["text_to_image_r5"] <= 100


def test_expected_recall_by_simulation():
  """Against drawing rankings at random, on a small made-up table."""
  rng = np.random.default_rng(0)
  table = rng.random((12, 6)) < 0.3
  table[np.arange(12), np.arange(12) // 2] = True
  expected = oracle.retrieval(table)
  hits = collections.defaultdict(list)
  for _ in range(3000):
    for k in (1, 5):
      rank = np.argsort(table.sum(1)[:, None] + 99 * ~table + rng.random(table.shape), axis=0)[:k]
      hits[f"image_to_text_r{k}"].append(np.mean((rank // 2 == np.arange(6)).any(0)))
      rank = np.argsort(99 * ~table + rng.random(table.shape), axis=1)[:, :k]
      hits[f"text_to_image_r{k}"].append(np.mean((rank == np.arange(12)[:, None] // 2).any(1)))
  for name, values in hits.items():
    assert expected[name] == pytest.approx(100 * np.mean(values), abs=1.0), name


def test_vqa_records():
  source = SceneVqaSource(DEFAULT, "val", questions_per_image=8)
  record = source[3]
  assert len(source) == 1000
  assert record["image_id"] == "val-3"
  assert not record["unseen"]
  assert record["image"].shape == (96, 96, 3)
  assert len(record["questions"]) == 8
  for q, made in zip(record["questions"], questions(scenes.scene(DEFAULT, "val", 3)), strict=True):
    assert (q["question"], q["answers"], q["family"]) == (made.text, [made.answer], made.family)
    assert q["weights"] == [1.0]
    assert q["dataset"] == "scenes"
  assert len({q["question_id"] for i in range(5) for q in source[i]["questions"]}) == 40
  test = SceneVqaSource(DEFAULT, "test")
  flags = collections.Counter()
  for i in range(100):
    record = test[i]
    scene = scenes.scene(DEFAULT, "test", i)
    pairs = {(o.shape, o.color) for o in scene.objects}
    assert record["unseen"] == bool(pairs & scenes.HELD_OUT)
    for q in record["questions"]:
      if q["family"] in ("color", "shape"):  # the scene shows the answer
        assert record["unseen"] or not q["unseen"]
        named = {*attribute_words(q["question"]), *q["answers"]}
        about = [o for o in scene.objects if named <= set(o[:3])]
        assert q["unseen"] == about[0].held_out
        flags[q["unseen"]] += 1
  assert min(flags[True], flags[False]) > 10


def test_rendering_is_fast_enough_to_need_no_cache():
  start = time.process_time()
  for i in range(300):
    rendering.render(scenes.scene(DEFAULT, "train", i), DEFAULT)
  assert 300 / (time.process_time() - start) > 500


def test_errors_name_the_allowed_values():
  with pytest.raises(ValueError, match="Scene difficulty 'easy' is unknown.*default.*hard"):
    scenes.SceneConfig(difficulty="easy")
  with pytest.raises(ValueError, match="48"):
    scenes.SceneConfig(size=16)
  with pytest.raises(ValueError, match="seed"):
    scenes.SceneConfig(seed=-1)
  with pytest.raises(ValueError, match="Scene split 'dev' is unknown"):
    scenes.scene(DEFAULT, "dev", 0)
  with pytest.raises(IndexError, match="Scene 1000 is not in split 'val' of 1000"):
    scenes.scene(DEFAULT, "val", 1000)
  with pytest.raises(ValueError, match=r"scene\.config"):
    rendering.render(scenes.scene(DEFAULT, "val", 0), HARD)
  with pytest.raises(ValueError, match="1 to 12"):
    questions(scenes.scene(DEFAULT, "val", 0), 13)
  with pytest.raises(ValueError, match="at most 8"):
    scene_text.captions(scenes.scene(DEFAULT, "val", 0), 9)
