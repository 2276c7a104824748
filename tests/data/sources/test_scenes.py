"""Scenes as records of every task: content, reproducibility and the ends of splits."""

import ml_collections
import numpy as np
import pytest

from mplug_jax.data.sources import scenes as scene_sources
from mplug_jax.scenes import pairs as scene_pairs
from mplug_jax.scenes import scene
from mplug_jax.scenes import text as scene_text

CONFIG = scene_sources.scene_config(
  ml_collections.ConfigDict({"size": 64, "seed": 3, "difficulty": "default"})
)


@pytest.mark.parametrize(
  ("source", "images", "texts"),
  [
    (scene_sources.SceneCaptions, lambda r: [r["image"]], lambda r: r["captions"]),
    (
      scene_sources.SceneExpressions,
      lambda r: [r["image"]],
      lambda r: [e["text"] for e in r["expressions"]],
    ),
    (scene_sources.ScenePairs, lambda r: r["images"], lambda r: [r["sentence"]]),
    (scene_sources.SceneEntailment, lambda r: [r["image"]], lambda r: [r["sentence"]]),
    (scene_sources.SceneClips, lambda r: list(r["image"]), lambda r: r["captions"]),
  ],
)
def test_records_repeat_themselves_and_end_with_the_split(source, images, texts):
  split = source(CONFIG, "val")
  assert len(split) == scene.split_size("val")
  assert len(source(CONFIG, "val", 7)) == 7
  first, again = split[5], source(CONFIG, "val", 7)[5]
  assert texts(first) == texts(again)
  assert all(map(np.array_equal, images(first), images(again)))
  assert {x.shape for x in images(first)} == {(64, 64, 3)}
  assert all(isinstance(text, str) and text for text in texts(first))
  with pytest.raises(IndexError, match="record 7 is not among the 7 of split 'val'"):
    source(CONFIG, "val", 7)[7]


def test_what_records_say_beside_their_texts():
  captions = scene_sources.SceneCaptions(CONFIG, "test", captions=6)
  assert len(captions[0]["captions"]) == 6
  assert (
    captions.captions(3)
    == captions[3]["captions"]
    == scene_text.captions(scene.scene(CONFIG, "test", 3), 6)
  )
  expressions = scene_sources.SceneExpressions(CONFIG, "test", expressions=3)
  x1, y1, x2, y2 = expressions[2]["expressions"][1]["box"]
  assert 0 <= x1 < x2 <= 64
  assert 0 <= y1 < y2 <= 64
  assert len(expressions.expressions(2)) == 3
  pairs, entailment = (
    scene_sources.ScenePairs(CONFIG, "test"),
    scene_sources.SceneEntailment(CONFIG, "test"),
  )
  assert [pairs[i]["label"] for i in range(4)] == [True, False, True, False]
  assert pairs.sentence(1) == pairs[1]["sentence"]
  assert [entailment[i]["label"] for i in range(3)] == list(scene_pairs.LABELS)
  assert entailment.sentence(2) == entailment[2]["sentence"]
  clips = scene_sources.SceneClips(CONFIG, "test", frames=4)
  assert len(clips[0]["image"]) == 4
  assert len(clips.captions(0)) == 5
  assert clips.questions(3) == clips[3]["questions"]
  assert clips.questions(3)[4]["family"] == "finally"
  assert clips.questions(3)[4]["question_id"] == "test-3-4"
