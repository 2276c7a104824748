"""Further statements about the scenes that a record of scene_pairs.py shows, for training: half of them like the records', half easier.

Encoding an image costs more than another sentence about it. The easier ones, about single objects, are there to be learnt first:
from random initialisation, a relation between two objects teaches nothing until both are found.
"""

from mplug_jax.data import scene_pairs, scenes
from mplug_jax.data.scene_text import Desc, Words, describe, matching, pick, with_article

_TRIES = 40  # of one kind of statement on the given images, before another one is taken


# ---- two images


def pair_statements(rng, left, right, count):
  """`count` statements [(text, "True" or "False"), ...] about two scenes of one split, each true with probability 1/2."""
  found = []
  for _ in range(count):
    label, make = bool(rng.integers(2)), pick(rng, (_pair_statement, _shown_on_one_side))
    found.append((make(rng, left, right, label), str(label)))
  return found


def _pair_statement(rng, left, right, label):
  """A statement by a template of the records, with values that theirs have."""
  while True:
    kind, content, template = pick(rng, scene_pairs._PAIR_TEMPLATES)
    cases = (scene_pairs._SHOWN | scene_pairs._COUNTED)[kind][1 if label else 2]
    for _ in range(_TRIES):
      _, words, value = scene_pairs._content(rng, left.config, left.split, content)
      if (value(left), value(right)) in cases:
        return template.format(x=words)


def _shown_on_one_side(rng, left, right, label):
  """"the left image shows a red thing", true or false; the other image does not matter."""
  side, scene = pick(rng, (("left", left), ("right", right)))
  while True:
    names = pick(rng, (("colour",), ("shape",), ("colour", "shape")))
    shape, colour = pick(rng, scenes.allowed_pairs(scene.config, scene.split))
    value = {"shape": shape, "colour": colour}
    desc = describe(pick(rng, scene.objects), names) if label else Desc(**{name: value[name] for name in names})
    if bool(matching(scene, desc)) == label:
      return f"the {side} image shows {with_article(Words(rng).say(desc))}"


# ---- one image


def hypotheses(rng, scene, count):
  """`count` hypotheses [(text, one of scene_pairs.LABELS), ...] about a scene, the labels equally often where they are possible."""
  found = []
  while len(found) < count:
    label, make = pick(rng, scene_pairs.LABELS), pick(rng, (_relation, _colour))
    if text := make(rng, scene, label):
      found.append((text, label))
  return found


def _relation(rng, scene, label):
  """A hypothesis as the records have, or None: the scene may lack two objects that can be named."""
  form = _neutral(rng, scene) if label == "neutral" else scene_pairs._hypothesis(rng, scene, label == "entailment")
  if form is None:
    return None
  words = Words(rng)
  first, second = ("the " + words.say(desc) for desc in form.objects)
  return f"{first} is {words.relation(form.relations[0][0])} {second}"


def _neutral(rng, scene):
  """A claim about another scene's objects, exactly one of which this scene shows; None when none is soon found."""
  for _ in range(_TRIES):
    other = scenes.scene(scene.config, scene.split, int(rng.integers(scenes.split_size(scene.split))))
    form = scene_pairs._hypothesis(rng, other, bool(rng.integers(2)))
    if form and sorted(len(matching(scene, desc)) for desc in form.objects) == [0, 1]:
      return form
  return None


def _colour(rng, scene, label):
  """"the star is red": every star is, none is, or there is no star; None when no such claim is soon found."""
  for _ in range(_TRIES):
    shape, colour = pick(rng, scenes.allowed_pairs(scene.config, scene.split))
    colours = {thing.colour for thing in matching(scene, Desc(shape=shape))}
    truth = "neutral" if not colours else "entailment" if colours == {colour} else "contradiction" if colour not in colours else None
    if truth == label:
      return f"the {Words(rng).say(Desc(shape=shape))} is {colour}"
  return None
