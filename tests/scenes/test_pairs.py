"""Pairs, entailment and clips of scenes: labels are right and balanced."""

import collections

import numpy as np
import pytest

from mplug_jax.scenes import clips, oracle
from mplug_jax.scenes import pairs as scene_pairs
from mplug_jax.scenes import scene as scenes
from tests.support.scenes_case import (
  BOTH,
  attribute_words,
  form_words,
  text_only_accuracy,
)


@BOTH
@pytest.mark.parametrize("make", [scene_pairs.pair, scene_pairs.entailment])
def test_words_of_pairs_and_hypotheses_do_not_predict_the_label(config, make, monkeypatch):
  real = [make(config, "train", i).text for i in range(12)]
  some = scenes.scene(config, "train", 0)
  monkeypatch.setattr(scene_pairs, "_find", lambda *args: some)  # the search for images is slow
  records = [(r.text, r.label) for r in (make(config, "train", i) for i in range(6000))]
  assert [text for text, _ in records[:12]] == real  # and does not change the words
  chance = 1 / len({label for _, label in records})
  assert abs(text_only_accuracy(records) - chance) < 0.04


@BOTH
def test_pairs_are_labeled_right_and_balanced(config):
  by_template = collections.defaultdict(list)
  pairs = [
    scene_pairs.pair(config, "train", i) for i in range(2 * 6 * scene_pairs.PAIR_TEMPLATE_COUNT)
  ]
  for p in pairs:
    assert oracle.judge_pair(p.form, p.left, p.right) == p.label, p
    assert sorted(attribute_words(p.text)) == sorted(form_words(p.form[1])), p
    assert p.left != p.right
    assert p.left.split == "train"
    assert not p.unseen
    by_template[p.template].append(p.label)
  assert len(by_template) == scene_pairs.PAIR_TEMPLATE_COUNT
  assert {np.mean(labels) for labels in by_template.values()} == {0.5}


@BOTH
def test_entailment_is_labeled_right_and_balanced(config):
  triples = [scene_pairs.entailment(config, "train", i) for i in range(600)]
  for t in triples:
    assert oracle.judge_entailment(t.form, t.premise) == t.label, t
    assert sorted(attribute_words(t.text)) == sorted(form_words(t.form.objects))
  assert collections.Counter(t.label for t in triples) == dict.fromkeys(scene_pairs.LABELS, 200)


@BOTH
def test_clips(config):
  directions = collections.Counter()
  answers = collections.Counter()
  for i in range(200):
    clip = clips.clip(config, "test", i, frames=4)
    first = clip.frames[0]
    last = clip.frames[-1]
    assert len(clip.captions) == len(clip.questions) == 5
    assert all(oracle.holds_clip(c.form, clip.frames) for c in clip.captions)
    for q in clip.questions:
      assert oracle.answer_clip(q.form, clip.frames) == q.answer, (q, clip.moves)
      answers[q.family, q.answer] += 1
    for number, direction in clip.moves.items():
      steps = np.diff([f.objects[number].center for f in clip.frames], axis=0)
      want = np.array(clips.STEPS[direction])
      assert (steps @ want > 0).all()
      assert (steps @ want[::-1] == 0).all()
      assert np.ptp(steps @ want) <= 1  # constant speed, to the pixel
      for frame in clip.frames:
        assert all(
          scenes.overlap(frame.objects[number], o) == 0
          for j, o in enumerate(frame.objects)
          if j != number
        )
        assert all(0 < v < config.size for v in frame.objects[number].box)
    directions[clip.moves[next(iter(clip.moves))]] += 1
    still = [o for j, o in enumerate(first.objects) if j not in clip.moves]
    assert still == [o for j, o in enumerate(last.objects) if j not in clip.moves] != []
  assert directions == dict.fromkeys(clips.STEPS, 50)
  for family in ("moves", "finally"):
    assert 0.4 < answers[family, "yes"] / 200 < 0.6
  video = clips.render_clip(clip, config)
  assert video.shape == (4, config.size, config.size, 3)
  assert video.dtype == np.uint8
  assert (video[0] != video[-1]).any()
  with pytest.raises(ValueError, match="at least 2 frames"):
    clips.clip(config, "test", 0, frames=1)
