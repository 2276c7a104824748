"""Further statements about the scenes that a record of scene_pairs.py shows, for training: some like the records', some easier.

Encoding an image costs more than another sentence about it. The easier ones, about single objects, are there to be learnt first:
from random initialisation, a relation between two objects teaches nothing until both are found and known to be somewhere. And
statements come in sets that differ in little but their labels, so that what they have in common cancels from the gradient.
"""

import functools

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
_KINDS = 10  # sets tried for each statement: images that look alike allow very few


def _collect(rng, alike, simple, easier, count):
  """At most `count` (text, label) of the sets that functions () -> [(text, label), ...] make, with the probability `easier` one of
  `simple`, else `alike`."""
  found = []
  for _ in range(_KINDS * count):
    if len(found) >= count:
      break
    some = (pick(rng, simple) if rng.random() < easier else alike)()
    found += [some[i] for i in rng.permutation(len(some))]
  return found[:count]


# ---- two images


def pair_statements(rng, left, right, count, easier=0.5):
  """At most `count` statements [(text, "True" or "False"), ...] about two scenes of one split, a share `easier` of them easier.

  A true and a false one of a kind are a set; a kind of which these images allow one alone is left out, or its words would tell the
  label. Relations, which most records need and which are the hardest, come twice as often as the other easier ones.
  """

  def both(make):
    texts = make(rng, left, right)
    return [(text, str(truth)) for truth, text in texts.items()] if len(texts) == 2 else []

  alike, *simple = (
    functools.partial(both, make)
    for make in (_like_the_records, _shown, _related, _related, _counted)
  )
  return _collect(rng, alike, simple, easier, count)


def _like_the_records(rng, left, right):
  """{truth: text} by a template of the records, with values that theirs have."""
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
  """{truth: text} of whether one, both or any of the images show something, told by colour, shape or both."""
  names = pick(rng, (("colour",), ("shape",), ("colour", "shape")))
  templates, true, false = (_ONE_SHOWS | scene_pairs.SHOWN)[
    pick(rng, ("left", "right", "any", "both"))
  ]
  template, words, texts = pick(rng, templates), Words(rng), {}
  pairs = scenes.allowed_pairs(left.config, left.split)
  for i in rng.permutation(len(pairs)):
    desc = Desc(
      **{name: value for name, value in zip(("shape", "colour"), pairs[i]) if name in names}
    )
    values = bool(matching(left, desc)), bool(matching(right, desc))
    if values in true or values in false:
      texts.setdefault(values in true, template.format(x=with_article(words.say(desc))))
  return texts


def _related(rng, left, right):
  """{truth: text} of two objects that one of the images shows, one beside the other. Half of them are told by colour and shape, as in a
  hypothesis: what entailment has learnt of relations begins there."""
  if rng.random() < 0.5:
    return _of_one(rng, left, right, "relation", "the {side} image shows {x}", lambda value: value)
  side, scene = pick(rng, (("left", left), ("right", right)))
  words, forms = (
    Words(rng),
    {truth: scene_pairs.hypothesis(rng, scene, truth) for truth in (True, False)},
  )
  if None in forms.values():
    return {}
  return {
    truth: f"the {side} image shows {with_article(words.say(first))} {words.relation(relation)} {with_article(words.say(second))}"
    for truth, ((first, second), ((relation, _, _),)) in forms.items()
  }


def _counted(rng, left, right):
  """{truth: text} of how many objects one of the images shows."""
  said = pick(rng, tuple(_NUMBERS))
  return _of_one(
    rng,
    left,
    right,
    "count",
    f"the {{side}} image shows {said} {{x}}",
    lambda value: value == _NUMBERS[said],
  )


def _of_one(rng, left, right, content, template, holds):
  """{truth: text} of the left image or the right one. holds: function of its value, see scene_pairs.content_of, None when in doubt."""
  (side, scene), texts = pick(rng, (("left", left), ("right", right))), {}
  for _ in range(_TRIES):
    _, words, value = scene_pairs.content_of(rng, scene.config, scene.split, content)
    if value(scene) is not None:
      texts.setdefault(holds(value(scene)), template.format(side=side, x=words))
    if len(texts) == 2:
      break
  return texts


# ---- one image


def hypotheses(rng, scene, count, easier=0.5):
  """At most `count` hypotheses [(text, one of scene_pairs.LABELS), ...] about a scene, a share `easier` of them easier; a set has one of
  each label."""
  alike, *simple = (functools.partial(make, rng, scene) for make in (_relation, _side, _colour))
  return _collect(rng, alike, simple, easier, count)


def _relation(rng, scene):
  """As the records have: "the red star is above the blue disc", the opposite, and either with an object that is not there."""
  form = scene_pairs.hypothesis(rng, scene, True)
  if form is None:
    return []
  words, ((relation, _, _),) = Words(rng), form.relations
  first, second = ("the " + words.say(desc) for desc in form.objects)
  holds, fails = (f" is {words.relation(r)} " for r in (relation, OPPOSITE[relation]))
  absent, verb = "the " + words.say(_absent(rng, scene)), pick(rng, (holds, fails))
  return [
    (first + holds + second, "entailment"),
    (first + fails + second, "contradiction"),
    (pick(rng, (first + verb + absent, absent + verb + second)), "neutral"),
  ]


def _absent(rng, scene):
  """Shape and colour of an object that the scene does not show."""
  shown = {(thing.shape, thing.colour) for thing in scene.objects}
  shape, colour = pick(
    rng, [pair for pair in scenes.allowed_pairs(scene.config, scene.split) if pair not in shown]
  )
  return Desc(colour=colour, shape=shape)


def _side(rng, scene):
  """ "the red star is left of the middle": every such star is; then the opposite, and an object that is not there."""
  middle = scenes.Object("", "", "", (scene.config.size / 2,) * 4, 0, ())
  thing = pick(rng, scene.objects)
  desc = Desc(colour=thing.colour, shape=thing.shape)
  ways = [related(scene, other, middle) for other in matching(scene, desc)]
  sides = [direction for direction in DIRECTIONS if all(direction in w for w in ways)]
  if not sides:
    return []
  words, direction = Words(rng), pick(rng, sides)
  said = [f" is {words.relation(d)} the middle" for d in (direction, OPPOSITE[direction])]
  shown, absent = ("the " + words.say(d) for d in (desc, _absent(rng, scene)))
  return [
    (shown + said[0], "entailment"),
    (shown + said[1], "contradiction"),
    (absent + pick(rng, said), "neutral"),
  ]


def _colour(rng, scene):
  """ "the star is red": every star is; then another colour, which no star has, and a shape that is not there."""
  pairs = scenes.allowed_pairs(scene.config, scene.split)
  colours = {
    shape: {thing.colour for thing in matching(scene, Desc(shape=shape))}
    for shape in scene.config.shapes
  }
  plain = [shape for shape, found in colours.items() if len(found) == 1]
  missing = [shape for shape, found in colours.items() if not found]
  if not plain or not missing:
    return []
  shape, none = pick(rng, plain), pick(rng, missing)
  (right,) = colours[shape]
  wrong = pick(rng, [colour for name, colour in pairs if name == shape and colour != right])
  other = pick(rng, [colour for name, colour in pairs if name == none])
  words = Words(rng)
  shown, absent = (f"the {words.say(Desc(shape=name))} is " for name in (shape, none))
  return [
    (shown + right, "entailment"),
    (shown + wrong, "contradiction"),
    (absent + other, "neutral"),
  ]
