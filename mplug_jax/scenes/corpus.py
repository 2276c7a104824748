"""The texts of every task on procedural scenes. All their tokenizers are fitted to these, so that any run can start from any other one."""

import numpy as np

from mplug_jax.scenes import pairs, questions, statements
from mplug_jax.scenes import scene as scenes
from mplug_jax.scenes import text as scene_text

_CAPTIONS, _EXPRESSIONS, _QUESTIONS, _FURTHER = 5, 4, 8, 3  # of a record


def texts(config, records=0):
  """Captions, questions with answers, referring expressions and statements of `records` training scenes, evenly spaced; 0: all.

  Args:
    config: SceneConfig.
  """
  size = scenes.split_size("train")
  for index in range(0, size, max(1, size // records) if records else 1):
    scene, rng = scenes.scene(config, "train", index), np.random.default_rng(index)
    yield from scene_text.captions(scene, _CAPTIONS)
    yield from (found["text"] for found in scene_text.referring(scene, _EXPRESSIONS))
    for question in questions.questions(scene, _QUESTIONS):
      yield from (question.text, question.answer)
    pair = pairs.pair(config, "train", index)
    yield from (pair.text, pairs.entailment(config, "train", index).text)
    yield from (
      text for text, _ in statements.pair_statements(rng, pair.left, pair.right, _FURTHER)
    )
    yield from (text for text, _ in statements.hypotheses(rng, scene, _FURTHER))
