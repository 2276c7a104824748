"""Scene configs and word lists of the tests."""

import collections
import itertools
import math
import re

import numpy as np
import pytest

from mplug_jax.scenes import scene as scenes

DEFAULT = scenes.SceneConfig()


HARD = scenes.SceneConfig(difficulty="hard")


BOTH = pytest.mark.parametrize("config", [DEFAULT, HARD], ids=["default", "hard"])


PLAIN = {
  "little": "small",
  "tiny": "small",
  "big": "large",
  "violet": "purple",
  "disc": "circle",
  "discs": "circle",
  "rhombus": "diamond",
  "rhombuses": "diamond",
  "plus": "cross",
}


WORDS = {
  **{w: w for w in (*scenes.SIZES, *scenes.COLORS, *scenes.SHAPES)},
  **PLAIN,
  **{s + "s": s for s in scenes.SHAPES},
  "crosses": "cross",
}


def attribute_words(text):
  """Sizes, colors and shapes a text names, synonyms made plain, in the order of the text."""
  return [WORDS[w] for w in re.findall(r"[a-z]+", text) if w in WORDS]


def form_words(form):
  """Sizes, colors and shapes of a form, in any nesting."""
  if isinstance(form, str):
    return [form] if form in WORDS.values() else []
  return [
    w for part in form if part is not None and not isinstance(part, int) for w in form_words(part)
  ]


def text_only_accuracy(records):
  """Accuracy of naive Bayes on words and word pairs, fitted to 2/3 of (text, label) records.

  It is scored on the rest. Needs thousands: its spread over samples is wider than binomial.
  """
  bags = [(set(t.split()) | set(itertools.pairwise(t.split())), y) for t, y in records]
  cut = len(bags) * 2 // 3
  totals = collections.Counter()
  words = collections.defaultdict(collections.Counter)
  for bag, label in bags[:cut]:
    totals[label] += 1
    words[label].update(bag)

  def guess(bag):
    return max(
      totals,
      key=lambda y: (
        math.log(totals[y]) + sum(math.log((words[y][w] + 1) / (totals[y] + 2)) for w in bag)
      ),
    )

  return np.mean([guess(bag) == label for bag, label in bags[cut:]])
