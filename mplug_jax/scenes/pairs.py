"""Statements about two scenes (as in NLVR2) and entailment triples (as in SNLI-VE).

Pairs: words and label are drawn first and independently, then images that make the label right.
Template and label come from the index of the record, so each template is true in half of its uses.

Entailment: the premise is the image; a hypothesis is "the A is <relation> the B", where A and B are
a color and a shape. `entailment`: the image shows both and the relation holds. `contradiction`: it
shows both and the opposite relation holds. `neutral`: it shows exactly one of A and B. For every
label the hypothesis is written about a scene with both objects and is true of it half the time; a
neutral record then shows another image. So words have the same distribution under all labels.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mplug_jax.scenes import scene as scenes
from mplug_jax.scenes.text import (
  DIRECTIONS,
  OPPOSITE,
  Desc,
  Statement,
  Words,
  describe,
  matching,
  pick,
  related,
  with_article,
)

LABELS = ("entailment", "neutral", "contradiction")

# kind -> (templates, image values (left, right) of true records, of false ones). Values: whether
# the image shows {x}, or the number of {x}.
SHOWN = {
  "both": (
    ("both images show {x}", "each of the two images shows {x}"),
    ((True, True),),
    ((True, False), (False, True)),
  ),
  "one": (
    ("exactly one of the two images shows {x}", "only one of the images shows {x}"),
    ((True, False), (False, True)),
    ((True, True), (False, False)),
  ),
  "left_only": (
    ("only the left image shows {x}",),
    ((True, False),),
    ((False, True), (True, True), (False, False)),
  ),
  "right_only": (
    ("only the right image shows {x}",),
    ((False, True),),
    ((True, False), (True, True), (False, False)),
  ),
  "any": (
    ("at least one of the images shows {x}",),
    ((True, False), (False, True)),
    ((False, False),),
  ),
  "neither": (
    ("neither image shows {x}", "none of the two images shows {x}"),
    ((False, False),),
    ((True, False), (False, True)),
  ),
}
COUNTED = {
  "more_left": (
    (
      "there are more {x} in the left image than in the right image",
      "the left image has more {x} than the right one",
    ),
    ((1, 0), (2, 0), (2, 1)),
    ((0, 1), (0, 2), (1, 2)),
  ),
  "more_right": (
    (
      "there are more {x} in the right image than in the left image",
      "the right image has more {x} than the left one",
    ),
    ((0, 1), (0, 2), (1, 2)),
    ((1, 0), (2, 0), (2, 1)),
  ),
  "same": (
    ("the two images show the same number of {x}", "both images have equally many {x}"),
    ((0, 0), (1, 1), (2, 2)),
    ((0, 1), (1, 0), (1, 2), (2, 1)),
  ),
  "two": (
    ("there are two {x} in the two images together",),
    ((0, 2), (1, 1), (2, 0)),
    ((0, 1), (1, 0), (1, 2), (2, 1)),
  ),
  "three": (
    ("there are three {x} in the two images together",),
    ((1, 2), (2, 1), (0, 3), (3, 0)),
    ((0, 2), (1, 1), (2, 0), (2, 2)),
  ),
}
PAIR_TEMPLATES = [  # (kind, content of {x}, template)
  *(
    (kind, content, text)
    for kind, entry in SHOWN.items()
    for text in entry[0]
    for content in ("object", "relation")
  ),
  *((kind, "count", text) for kind, entry in COUNTED.items() for text in entry[0]),
]
PAIR_TEMPLATE_COUNT = len(PAIR_TEMPLATES)


class Pair(NamedTuple):
  """Statement about two scenes.

  Attributes:
    text: the statement.
    label: its truth.
    form: (kind, Statement or Desc), see oracle.judge_pair.
    left: left scene.
    right: right scene.
    template: index into PAIR_TEMPLATES.
    unseen: True if the statement names a held-out (shape, color) pair.
  """

  text: str
  label: bool
  form: tuple
  left: scenes.Scene
  right: scenes.Scene
  template: int
  unseen: bool


class Entailment(NamedTuple):
  """Hypothesis about one scene.

  Attributes:
    text: the hypothesis.
    label: one of LABELS.
    form: what the hypothesis claims.
    premise: the scene.
    unseen: True if the hypothesis names a held-out (shape, color) pair.
  """

  text: str
  label: str
  form: Statement
  premise: scenes.Scene
  unseen: bool


def _find(rng, config, split, accepts, other_than=None):
  """Returns the first scene that `accepts` from a random index on."""
  size = scenes.split_size(split)
  start = int(rng.integers(size))
  for step in range(size):
    candidate = scenes.scene(config, split, (start + step) % size)
    if candidate.index != other_than and accepts(candidate):
      return candidate
  raise ValueError(
    f"Split {split!r} of {config} has no scene that fits the statement; use another seed."
  )


def _relation_value(scene, statement):
  """Returns the truth of a relation, None when an object is missing or the answer is in doubt."""
  (first, second), ((direction, _, _),) = statement
  ways = [
    related(scene, a, b)
    for a in matching(scene, first)
    for b in matching(scene, second)
    if a is not b
  ]
  if any(direction in w for w in ways):
    return True
  return False if ways and all(OPPOSITE[direction] in w for w in ways) else None


def content_of(
  rng: np.random.Generator, config: scenes.SceneConfig, split: str, kind: str
) -> tuple[Statement | Desc, str, Callable[[scenes.Scene], bool | int | None]]:
  """Draws the content of a statement.

  Args:
    rng: generator of the record.
    config: of the scenes.
    split: "train", "val" or "test".
    kind: "object", "relation" or "count".

  Returns:
    (form, words, function from a scene to its value: truth, number, or None if in doubt).
  """
  words = Words(rng)
  name = pick(rng, ("shape", "color"))
  values = config.shapes if name == "shape" else config.colors
  if kind == "object":
    shape, color = pick(rng, scenes.allowed_pairs(config, split))
    desc = Desc(color=color, shape=shape)
    return Statement((desc,)), with_article(words.say(desc)), lambda s: bool(matching(s, desc))
  if kind == "count":
    desc = Desc(**{name: pick(rng, values)})
    return desc, words.say(desc, plural=True), lambda s: len(matching(s, desc))
  first, second = (Desc(**{name: values[i]}) for i in rng.permutation(len(values))[:2])
  direction = pick(rng, DIRECTIONS)
  form = Statement((first, second), ((direction, 0, 1),))
  text = " ".join(
    (with_article(words.say(first)), words.relation(direction), with_article(words.say(second)))
  )
  return form, text, lambda s: _relation_value(s, form)


def pair(config: scenes.SceneConfig, split: str, index: int) -> Pair:
  """Returns record `index` of the pair task: a statement, its truth, two scenes of the split.

  For a statement about a relation both images show both objects, so the relation decides.

  Raises:
    IndexError: not 0 <= index < split_size(split).
  """
  rng = scenes.generator(config, split, index, "pair")
  label = index % 2 == 0
  number = index // 2 % PAIR_TEMPLATE_COUNT
  kind, content, template = PAIR_TEMPLATES[number]
  form, words, value = content_of(rng, config, split, content)
  cases = (SHOWN | COUNTED)[kind][1 if label else 2]
  wanted_left, wanted_right = pick(rng, cases)
  left = _find(rng, config, split, lambda s: value(s) is not None and value(s) == wanted_left)
  right = _find(
    rng, config, split, lambda s: value(s) is not None and value(s) == wanted_right, left.index
  )
  unseen = content == "object" and isinstance(form, Statement) and form.objects[0].held_out
  return Pair(template.format(x=words), label, (kind, form), left, right, number, unseen)


def hypothesis(rng: np.random.Generator, scene: scenes.Scene, truth: bool) -> Statement | None:
  """Returns a claim about two objects of unique color and shape, None if the scene lacks them."""
  objects = [o for o in scene.objects if len(matching(scene, describe(o, ("color", "shape")))) == 1]
  if len(objects) < 2:
    return None
  a, b = (objects[i] for i in rng.permutation(len(objects))[:2])
  relations = related(scene, a, b)
  if a.size != b.size:
    relations.append("larger" if a.size == "large" else "smaller")
  relation = pick(rng, relations)
  descs = tuple(describe(o, ("color", "shape")) for o in (a, b))
  return Statement(descs, ((relation if truth else OPPOSITE[relation], 0, 1),))


def entailment(config: scenes.SceneConfig, split: str, index: int) -> Entailment:
  """Returns record `index` of the entailment task; labels alternate, so they are balanced.

  Raises:
    IndexError: not 0 <= index < split_size(split).
  """
  rng = scenes.generator(config, split, index, "entailment")
  label = LABELS[index % 3]
  truth = bool(rng.integers(2)) if label == "neutral" else label == "entailment"
  form = None
  while form is None:
    source = scenes.scene(config, split, int(rng.integers(scenes.split_size(split))))
    form = hypothesis(rng, source, truth)
  words = Words(rng)
  first, second = ("the " + words.say(d) for d in form.objects)
  text = f"{first} is {words.relation(form.relations[0][0])} {second}"
  premise = source
  if label == "neutral":
    premise = _find(
      rng, config, split, lambda s: sorted(len(matching(s, d)) for d in form.objects) == [0, 1]
    )
  return Entailment(text, label, form, premise, any(d.held_out for d in form.objects))
