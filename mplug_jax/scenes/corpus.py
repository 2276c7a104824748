"""The texts of all tasks on procedural scenes.

Every tokenizer for scenes is fitted to these texts, so runs can start from each other's parameters.
"""

from collections.abc import Iterator

import numpy as np

from mplug_jax.scenes import pairs, questions, statements
from mplug_jax.scenes import scene as scenes
from mplug_jax.scenes import text as scene_text

# Texts of each kind per record.
_CAPTIONS = 5
_EXPRESSIONS = 4
_QUESTIONS = 8
_FURTHER = 3


def texts(config: scenes.SceneConfig, records: int = 0) -> Iterator[str]:
  """Yields captions, questions, answers, referring expressions and statements of training scenes.

  Args:
    config: of the scenes.
    records: number of scenes, evenly spaced over the training split; 0 = all.
  """
  size = scenes.split_size("train")
  for index in range(0, size, max(1, size // records) if records else 1):
    scene = scenes.scene(config, "train", index)
    rng = np.random.default_rng(index)
    yield from scene_text.captions(scene, _CAPTIONS)
    yield from (expression["text"] for expression in scene_text.referring(scene, _EXPRESSIONS))
    for question in questions.questions(scene, _QUESTIONS):
      yield from (question.text, question.answer)
    pair = pairs.pair(config, "train", index)
    yield from (pair.text, pairs.entailment(config, "train", index).text)
    yield from (
      text for text, _ in statements.pair_statements(rng, pair.left, pair.right, _FURTHER)
    )
    yield from (text for text, _ in statements.hypotheses(rng, scene, _FURTHER))
