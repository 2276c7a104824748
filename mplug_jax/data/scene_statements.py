"""Further statements about the scenes that a record of scene_pairs.py shows, for training: half of them like the records', half easier.

Encoding an image costs more than another sentence about it. The easier ones, about single objects, are there to be learnt first:
from random initialisation, a relation between two objects teaches nothing until both are found and known to be somewhere.
"""

from mplug_jax.data import scene_pairs, scenes
from mplug_jax.data.scene_text import DIRECTIONS, OPPOSITE, Desc, Words, matching, pick, related, with_article

_TRIES = 40  # of one kind of statement on the given images, before another one is taken
_KINDS = 10  # tried for each statement: images that look alike allow very few


# ---- two images


def pair_statements(rng, left, right, count):
  """At most `count` statements [(text, "True" or "False"), ...] about two scenes of one split.

  Of every kind of statement a true and a false one are looked for, and one of them is taken at random: a kind of which these
  images allow one alone is left out, or its words would tell the label.
  """
  found = []
  for _ in range(_KINDS * count):
    if len(found) == count:
      break
    texts = pick(rng, (_like_the_records, _shown))(rng, left, right)
    if len(texts) == 2:
      label = bool(rng.integers(2))
      found.append((texts[label], str(label)))
  return found


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


def _shown(rng, left, right):
  """{truth: text} of whether both or any of the images show something, told by colour, shape or both."""
  names = pick(rng, (("colour",), ("shape",), ("colour", "shape")))
  templates, true, false = scene_pairs.SHOWN[pick(rng, ("any", "both"))]
  template, words, texts = pick(rng, templates), Words(rng), {}
  pairs = scenes.allowed_pairs(left.config, left.split)
  for i in rng.permutation(len(pairs)):
    desc = Desc(**{name: value for name, value in zip(("shape", "colour"), pairs[i]) if name in names})
    values = bool(matching(left, desc)), bool(matching(right, desc))
    if values in true or values in false:
      texts.setdefault(values in true, template.format(x=with_article(words.say(desc))))
  return texts


# ---- one image


def hypotheses(rng, scene, count):
  """At most `count` hypotheses [(text, one of scene_pairs.LABELS), ...] about a scene, labels equally often where they are possible."""
  found = []
  for _ in range(_KINDS * count):
    if len(found) == count:
      break
    label, make = pick(rng, scene_pairs.LABELS), pick(rng, (_relation, _relation, _colour, _side))
    if text := make(rng, scene, label):
      found.append((text, label))
  return found


def _relation(rng, scene, label):
  """A hypothesis as the records have, or None: the scene may lack two objects that can be named."""
  form = _neutral(rng, scene) if label == "neutral" else scene_pairs.hypothesis(rng, scene, label == "entailment")
  if form is None:
    return None
  words = Words(rng)
  first, second = ("the " + words.say(desc) for desc in form.objects)
  return f"{first} is {words.relation(form.relations[0][0])} {second}"


def _neutral(rng, scene):
  """A claim about another scene's objects, exactly one of which this scene shows; None when none is soon found."""
  for _ in range(_TRIES):
    other = scenes.scene(scene.config, scene.split, int(rng.integers(scenes.split_size(scene.split))))
    form = scene_pairs.hypothesis(rng, other, bool(rng.integers(2)))
    if form and sorted(len(matching(scene, desc)) for desc in form.objects) == [0, 1]:
      return form
  return None


def _side(rng, scene, label):
  """"the red star is left of the middle": every such star is, every one is on the other side, or there is none; or None as below."""
  middle = scene.config.size / 2
  middle = scenes.Object("", "", "", (middle,) * 4, 0, ())
  for _ in range(_TRIES):
    shape, colour = pick(rng, scenes.allowed_pairs(scene.config, scene.split))
    direction = pick(rng, DIRECTIONS)
    desc = Desc(colour=colour, shape=shape)
    ways = [related(scene, thing, middle) for thing in matching(scene, desc)]
    truth = ("neutral" if not ways else "entailment" if all(direction in w for w in ways)
             else "contradiction" if all(OPPOSITE[direction] in w for w in ways) else None)
    if truth == label:
      words = Words(rng)
      return f"the {words.say(desc)} is {words.relation(direction)} the middle"
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
