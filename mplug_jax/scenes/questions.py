"""Balanced questions about procedural scenes, and the source of VQA records made of them.

Thirteen families: `exist`, `size`, `check`, `relation`, `larger`, `more`, `same` (answers yes and
no, half and half) and `count`, `colour`, `shape`, `position`, `neighbour`, `extreme` (at least four
answers). So that words alone tell nothing, the answer is drawn before the words, and a question is
asked only where the scene could as well have given the opposite answer to words of the same kind;
`count` uses the theme around which the scene was made.
"""

from typing import NamedTuple

from mplug_jax.scenes import scene as scenes
from mplug_jax.scenes.text import (
  DIRECTIONS,
  OPPOSITE,
  PHRASES,
  Desc,
  Words,
  describe,
  matching,
  pick,
  related,
  with_article,
)

_WORDS = Words()
_EXTREMES = {"left": "leftmost", "right": "rightmost", "above": "topmost", "below": "bottommost"}
_ASKED = {"colour": "color", "shape": "shape"}  # attribute -> its American word, as in VQA v2


class Question(NamedTuple):
  """`form` = (kind, arguments...), which scene_oracle.answer evaluates. `unseen`: the question
  names or asks for a held-out (shape, colour) pair."""

  text: str
  answer: str
  family: str
  form: tuple
  unseen: bool


def _yes_no(rng):
  return bool(rng.integers(2))


def _the(desc):
  return "the " + _WORDS.say(desc)


def _shuffled(rng, items):
  return [items[i] for i in rng.permutation(len(items))]


def _unique(rng, scene, options):
  """(object, description) in random order, for objects which one of `options` (tuples of
  attribute names, tried in random order) singles out."""
  for thing in _shuffled(rng, scene.objects):
    for names in _shuffled(rng, options):
      desc = describe(thing, names)
      if len(matching(scene, desc)) == 1:
        yield thing, desc
        break


def _exist(rng, scene):
  wanted = _yes_no(rng)
  names = pick(rng, (("colour", "shape"), ("colour", "shape"), ("shape",), ("colour",)))
  pairs = scenes.allowed_pairs(scene.config, scene.split)
  every = sorted({describe(Desc(None, colour, shape), names) for shape, colour in pairs})
  present = [d for d in every if matching(scene, d)]
  absent = [d for d in every if d not in present]
  if not absent:
    return None
  desc = pick(rng, present if wanted else absent)
  noun = with_article(_WORDS.say(desc))
  text = pick(rng, ("is there {}?", "does the image show {}?", "can you see {}?")).format(noun)
  return text, wanted, ("exists", desc), [desc]


def _size(rng, scene):
  wanted = _yes_no(rng)
  for thing, desc in _unique(rng, scene, [("colour", "shape")]):
    value = thing.size if wanted else scenes.SIZES[thing.size == "small"]
    return f"is {_the(desc)} {value}?", wanted, ("check", "size", value, desc), [thing]
  return None


def _check(rng, scene):
  wanted = _yes_no(rng)
  for thing, desc in _unique(rng, scene, [("shape",), ("size", "shape")]):
    colours = [c for s, c in scenes.allowed_pairs(scene.config, scene.split) if s == thing.shape]
    value = thing.colour if wanted else pick(rng, [c for c in colours if c != thing.colour])
    form = ("check", "colour", value, desc)
    return f"is {_the(desc)} {value}?", wanted, form, [thing, desc._replace(colour=value)]
  return None


def _two_unique(rng, scene):
  options = [("colour", "shape"), ("size", "shape"), ("size", "colour", "shape")]
  return list(_unique(rng, scene, options))[:2]


def _relation(rng, scene):
  wanted = _yes_no(rng)
  found = _two_unique(rng, scene)
  if len(found) < 2:
    return None
  (a, first), (b, second) = found
  direction = pick(rng, related(scene, a, b))
  direction = direction if wanted else OPPOSITE[direction]
  text = f"is {_the(first)} {PHRASES[direction][0]} {_the(second)}?"
  return text, wanted, ("holds", direction, first, second), [a, b]


def _larger(rng, scene):
  wanted = _yes_no(rng)
  found = list(_unique(rng, scene, [("colour", "shape")]))
  pairs = [(a, b) for a in found for b in found if (a[0].size, b[0].size) == ("large", "small")]
  if not pairs:
    return None
  (a, first), (b, second) = pick(rng, pairs)
  relation = pick(rng, ("larger", "smaller"))
  if wanted != (relation == "larger"):
    first, second = second, first
  text = f"is {_the(first)} {PHRASES[relation][0]} {_the(second)}?"
  return text, wanted, ("holds", relation, first, second), [a, b]


def _more(rng, scene):
  wanted = _yes_no(rng)
  name = pick(rng, ("shape", "colour"))
  values = scene.config.shapes if name == "shape" else scene.config.colours
  descs = [Desc(**{name: value}) for value in values]
  counts = {d: len(matching(scene, d)) for d in descs}
  unequal = [(a, b) for a in descs for b in descs if counts[a] > counts[b]]
  if not unequal:
    return None
  many, few = pick(rng, unequal)
  first, second = (many, few) if wanted else (few, many)
  nouns = [_WORDS.say(d, plural=True) for d in (first, second)]
  return f"are there more {nouns[0]} than {nouns[1]}?", wanted, ("more", first, second), []


def _same(rng, scene):
  """Of two objects that differ in shape, the colour, or the other way round: when both may differ
  or agree, the words of the one give the other away."""
  wanted = _yes_no(rng)
  asked, other = pick(rng, (("colour", "shape"), ("shape", "colour")))
  found = list(_unique(rng, scene, [(other,), ("size", other)]))
  pairs = [(a, b) for a in found for b in found if getattr(a[0], other) != getattr(b[0], other)]
  agree = [(a, b) for a, b in pairs if getattr(a[0], asked) == getattr(b[0], asked)]
  if not agree or len(agree) == len(pairs):
    return None
  (a, first), (b, second) = pick(rng, agree if wanted else [p for p in pairs if p not in agree])
  text = f"do {_the(first)} and {_the(second)} have the same {_ASKED[asked]}?"
  return text, wanted, ("holds", f"same_{asked}", first, second), [a, b]


def _count(rng, scene):
  desc = Desc(**dict([scene.theme]))
  text = pick(
    rng,
    ("how many {} are there?", "how many {} can you see?", "what number of {} are in the image?"),
  ).format(_WORDS.say(desc, plural=True))
  return text, str(len(matching(scene, desc))), ("count", desc), matching(scene, desc)


def _colour(rng, scene):
  for thing, desc in _unique(rng, scene, [("shape",), ("size", "shape")]):
    text = pick(rng, ("what color is {}?", "what is the color of {}?")).format(_the(desc))
    return text, thing.colour, ("attribute", "colour", desc), [thing]
  return None


def _shape(rng, scene):
  for thing, desc in _unique(rng, scene, [("colour",), ("size", "colour")]):
    text = pick(rng, ("what shape is {}?", "what is the shape of {}?")).format(_the(desc))
    return text, thing.shape, ("attribute", "shape", desc), [thing]
  return None


def _position(rng, scene):
  middle, margin = scene.config.size / 2, scene.config.margin
  for thing, desc in _unique(rng, scene, [("colour", "shape"), ("size", "shape")]):
    x, y = thing.centre
    if min(abs(x - middle), abs(y - middle)) > margin:
      answer = f"{'top' if y < middle else 'bottom'} {'left' if x < middle else 'right'}"
      text = pick(rng, ("in which corner is {}?", "which corner is {} closest to?"))
      return text.format(_the(desc)), answer, ("position", desc), [thing]
  return None


def _neighbour(rng, scene):
  asked, other = pick(rng, (("colour", "shape"), ("shape", "colour")))
  for anchor, desc in _unique(rng, scene, [(other,), ("size", other)]):
    others = [o for o in scene.objects if o is not anchor]
    for direction in _shuffled(rng, DIRECTIONS):
      inside = [o for o in others if direction in related(scene, o, anchor)]
      outside = [o for o in others if OPPOSITE[direction] in related(scene, o, anchor)]
      if len(inside) == 1 and len(inside) + len(outside) == len(others):
        text = f"what {_ASKED[asked]} is the object {PHRASES[direction][0]} {_the(desc)}?"
        form = ("neighbour", asked, direction, desc)
        return text, getattr(inside[0], asked), form, [anchor, inside[0]]
  return None


def _extreme(rng, scene):
  asked = pick(rng, ("colour", "shape"))
  for thing in _shuffled(rng, scene.objects):
    ways = [set(related(scene, thing, o)) for o in scene.objects if o is not thing]
    directions = [d for d in DIRECTIONS if all(d in w for w in ways)]
    if directions:
      direction = pick(rng, directions)
      text = f"what {_ASKED[asked]} is the {_EXTREMES[direction]} object?"
      return text, getattr(thing, asked), ("extreme", asked, direction), [thing]
  return None


FAMILIES = {
  "exist": _exist,
  "size": _size,
  "check": _check,
  "relation": _relation,
  "larger": _larger,
  "more": _more,
  "same": _same,
  "count": _count,
  "colour": _colour,
  "shape": _shape,
  "position": _position,
  "neighbour": _neighbour,
  "extreme": _extreme,
}
YES_NO_FAMILIES = ("exist", "size", "check", "relation", "larger", "more", "same")
MAX_QUESTIONS = 12
_SCARCE = ("same", "larger", "neighbour")  # few scenes allow them, so they are tried first
_COMMON = tuple(f for f in FAMILIES if f not in _SCARCE)


def questions(scene: scenes.Scene, count: int = 8) -> list[Question]:
  """`count` different questions about a scene, as many families as it allows before any repeats.

  Raises ValueError when count > 12.
  """
  if not 0 < count <= MAX_QUESTIONS:
    raise ValueError(f"{count} questions about one scene: ask for 1 to {MAX_QUESTIONS}")
  rng = scenes.generator(scene.config, scene.split, scene.index, "questions")
  found = {}
  while len(found) < count:
    for family in [*_shuffled(rng, _SCARCE), *_shuffled(rng, _COMMON)]:
      drawn = FAMILIES[family](rng, scene)
      if drawn is not None and len(found) < count:
        text, answer, form, about = drawn
        if isinstance(answer, bool):
          answer = "yes" if answer else "no"
        unseen = any(thing.held_out for thing in about)
        found.setdefault(form, Question(text, answer, family, form, unseen))
  return list(found.values())


class SceneVqaSource:
  """Random access to the VQA records of a split, each made when asked for.

  A record: image u8[H, W, 3], image_id str, unseen bool (the image shows a held-out pair), and
  questions, a list of {question_id str, question, answers = [answer], weights = [1.0], ocr = "",
  objects = "", dataset = "scenes", family, unseen}.
  """

  def __init__(self, config: scenes.SceneConfig, split: str, questions_per_image: int = 8):
    self.config, self.split, self.questions_per_image = config, split, questions_per_image
    self._size = scenes.split_size(split)

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> dict:
    scene = scenes.scene(self.config, self.split, int(index))
    image_id = f"{self.split}-{index}"
    return {
      "image": scenes.render(scene, self.config),
      "image_id": image_id,
      "unseen": scene.unseen,
      "questions": [
        {
          "question_id": f"{image_id}-{i}",
          "question": q.text,
          "answers": [q.answer],
          "weights": [1.0],
          "ocr": "",
          "objects": "",
          "dataset": "scenes",
          "family": q.family,
          "unseen": q.unseen,
        }
        for i, q in enumerate(questions(scene, self.questions_per_image))
      ],
    }
