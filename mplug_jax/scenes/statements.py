"""Further training statements about the scenes of a record of pairs.py, some of them easier.

Encoding an image costs more than encoding another sentence about it. The easier statements are
about single objects: from random initialization, the model cannot learn a relation between two
objects before it can locate both. Statements come in sets that differ in little but their labels,
so that the shared part cancels from the gradient.
"""

import functools

import numpy as np

from mplug_jax.scenes import pairs as scene_pairs
from mplug_jax.scenes import scene as scenes
from mplug_jax.scenes.text import (
  DIRECTIONS,
  OPPOSITE,
  Desc,
  Words,
  matching,
  pick,
  related,
  with_article,
)

_TRIES = 40  # of one kind of statement on the given images, before another one is taken
_NUMBERS = {"no": 0, "two": 2, "three": 3}
_SETS = 10  # sets tried for each statement: images that look alike allow very few


def _collect(rng, alike, simple, easy_fraction, count):
  """Returns at most `count` (text, label) of drawn sets.

  Args:
    rng: generator of the record.
    alike: function without arguments that draws a set like the records: [(text, label), ...].
    simple: functions that draw easier sets.
    easy_fraction: probability of an easier set.
    count: number of statements.
  """
  drawn = []
  for _ in range(_SETS * count):
    if len(drawn) >= count:
      break
    some = (pick(rng, simple) if rng.random() < easy_fraction else alike)()
    drawn += [some[i] for i in rng.permutation(len(some))]
  return drawn[:count]


# ---- two images


def pair_statements(
  rng: np.random.Generator,
  left: scenes.Scene,
  right: scenes.Scene,
  count: int,
  easy_fraction: float = 0.5,
) -> list[tuple[str, str]]:
  """Draws statements about two scenes.

  A set holds a true and a false statement of one kind. A kind that allows only one of them for
  these images is skipped, because its words would give the label away. Relations are the hardest
  and most records need them, so they are twice as frequent as the other easier kinds.

  Args:
    rng: generator of the record.
    left: left scene.
    right: right scene of the same split.
    count: largest number of statements.
    easy_fraction: share of easier statements.

  Returns:
    At most `count` of (text, "True" or "False").
  """

  def both(make):
    texts = make(rng, left, right)
    return [(text, str(truth)) for truth, text in texts.items()] if len(texts) == 2 else []

  alike, *simple = (
    functools.partial(both, make)
    for make in (_like_the_records, _shown, _related, _related, _counted)
  )
  return _collect(rng, alike, simple, easy_fraction, count)


def _like_the_records(rng, left, right):
  """Returns {truth: text} by a template of the records, with values that records use."""
  kind, content, template = pick(rng, scene_pairs.PAIR_TEMPLATES)
  _, true, false = (scene_pairs.SHOWN | scene_pairs.COUNTED)[kind]
  texts = {}
  for _ in range(_TRIES):
    _, words, value = scene_pairs.content_of(rng, left.config, left.split, content)
    values = value(left), value(right)
    if values in true or values in false:
      texts.setdefault(values in true, template.format(x=words))
    if len(texts) == 2:
      break
  return texts


# As scene_pairs.SHOWN, of one image.
_ONE_SHOWS = {
  "left": (
    ("the left image shows {x}",),
    ((True, True), (True, False)),
    ((False, True), (False, False)),
  ),
  "right": (
    ("the right image shows {x}",),
    ((True, True), (False, True)),
    ((True, False), (False, False)),
  ),
}


def _shown(rng, left, right):
  """Returns {truth: text}: one, both or any of the images show an object by color or shape."""
  names = pick(rng, (("color",), ("shape",), ("color", "shape")))
  templates, true, false = (_ONE_SHOWS | scene_pairs.SHOWN)[
    pick(rng, ("left", "right", "any", "both"))
  ]
  template = pick(rng, templates)
  words = Words(rng)
  texts = {}
  pairs = scenes.allowed_pairs(left.config, left.split)
  for i in rng.permutation(len(pairs)):
    desc = Desc(
      **{name: value for name, value in zip(("shape", "color"), pairs[i]) if name in names}
    )
    values = bool(matching(left, desc)), bool(matching(right, desc))
    if values in true or values in false:
      texts.setdefault(values in true, template.format(x=with_article(words.say(desc))))
  return texts


def _related(rng, left, right):
  """Returns {truth: text} about two related objects of one image.

  Half of the texts describe them by color and shape, as hypotheses of entailment do.
  """
  if rng.random() < 0.5:
    return _of_one(rng, left, right, "relation", "the {side} image shows {x}", lambda value: value)
  side, scene = pick(rng, (("left", left), ("right", right)))
  words = Words(rng)
  forms = {truth: scene_pairs.hypothesis(rng, scene, truth) for truth in (True, False)}
  texts = {}
  for truth, form in forms.items():
    if form is None:
      return {}
    (first, second), ((relation, _, _),) = form
    texts[truth] = (
      f"the {side} image shows {with_article(words.say(first))} "
      f"{words.relation(relation)} {with_article(words.say(second))}"
    )
  return texts


def _counted(rng, left, right):
  """Returns {truth: text} about the number of objects in one image."""
  number = pick(rng, tuple(_NUMBERS))
  return _of_one(
    rng,
    left,
    right,
    "count",
    f"the {{side}} image shows {number} {{x}}",
    lambda value: value == _NUMBERS[number],
  )


def _of_one(rng, left, right, content, template, holds):
  """Returns {truth: text} about one image; `holds` maps the value of content_of to a truth."""
  side, scene = pick(rng, (("left", left), ("right", right)))
  texts = {}
  for _ in range(_TRIES):
    _, words, value = scene_pairs.content_of(rng, scene.config, scene.split, content)
    if value(scene) is not None:
      texts.setdefault(holds(value(scene)), template.format(side=side, x=words))
    if len(texts) == 2:
      break
  return texts


# ---- one image


def hypotheses(
  rng: np.random.Generator, scene: scenes.Scene, count: int, easy_fraction: float = 0.5
) -> list[tuple[str, str]]:
  """Draws hypotheses about a scene; a set holds one per label.

  Args:
    rng: generator of the record.
    scene: the scene.
    count: largest number of hypotheses.
    easy_fraction: share of easier hypotheses.

  Returns:
    At most `count` of (text, one of pairs.LABELS).
  """
  alike, *simple = (functools.partial(make, rng, scene) for make in (_relation, _side, _color))
  return _collect(rng, alike, simple, easy_fraction, count)


def _relation(rng, scene):
  """Returns a set like the records: a relation, its opposite, and one with an absent object."""
  form = scene_pairs.hypothesis(rng, scene, True)
  if form is None:
    return []
  words = Words(rng)
  ((relation, _, _),) = form.relations
  first, second = ("the " + words.say(desc) for desc in form.objects)
  holds, fails = (f" is {words.relation(r)} " for r in (relation, OPPOSITE[relation]))
  absent = "the " + words.say(_absent(rng, scene))
  verb = pick(rng, (holds, fails))
  return [
    (first + holds + second, "entailment"),
    (first + fails + second, "contradiction"),
    (pick(rng, (first + verb + absent, absent + verb + second)), "neutral"),
  ]


def _absent(rng, scene):
  """Returns shape and color of an object that the scene does not show."""
  shown = {(item.shape, item.color) for item in scene.objects}
  shape, color = pick(
    rng, [pair for pair in scenes.allowed_pairs(scene.config, scene.split) if pair not in shown]
  )
  return Desc(color=color, shape=shape)


def _side(rng, scene):
  """Returns a set such as "the red star is left of the middle", true of all red stars."""
  middle = scenes.Object("", "", "", (scene.config.size / 2,) * 4, 0, (0, 0, 0))
  target = pick(rng, scene.objects)
  desc = Desc(color=target.color, shape=target.shape)
  ways = [related(scene, other, middle) for other in matching(scene, desc)]
  sides = [direction for direction in DIRECTIONS if all(direction in w for w in ways)]
  if not sides:
    return []
  words = Words(rng)
  direction = pick(rng, sides)
  verbs = [f" is {words.relation(d)} the middle" for d in (direction, OPPOSITE[direction])]
  shown, absent = ("the " + words.say(d) for d in (desc, _absent(rng, scene)))
  return [
    (shown + verbs[0], "entailment"),
    (shown + verbs[1], "contradiction"),
    (absent + pick(rng, verbs), "neutral"),
  ]


def _color(rng, scene):
  """Returns a set such as "the star is red": all stars are, none is, the scene has no star."""
  pairs = scenes.allowed_pairs(scene.config, scene.split)
  colors = {
    shape: {item.color for item in matching(scene, Desc(shape=shape))}
    for shape in scene.config.shapes
  }
  plain = [shape for shape, values in colors.items() if len(values) == 1]
  missing = [shape for shape, values in colors.items() if not values]
  if not plain or not missing:
    return []
  shape = pick(rng, plain)
  none = pick(rng, missing)
  (right,) = colors[shape]
  wrong = pick(rng, [color for name, color in pairs if name == shape and color != right])
  other = pick(rng, [color for name, color in pairs if name == none])
  words = Words(rng)
  shown, absent = (f"the {words.say(Desc(shape=name))} is " for name in (shape, none))
  return [
    (shown + right, "entailment"),
    (shown + wrong, "contradiction"),
    (absent + other, "neutral"),
  ]
