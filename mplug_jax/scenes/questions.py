"""Balanced questions about procedural scenes, and a source of VQA records.

Thirteen families: `exist`, `size`, `check`, `relation`, `larger`, `more`, `same` (half yes, half
no) and `count`, `color`, `shape`, `position`, `neighbor`, `extreme` (at least four answers). The
answer is drawn before the words, and a question is asked only if the scene also allows the opposite
answer to a question of the same kind, so the words alone do not give the answer away. `count` uses
the theme of the scene.
"""

from typing import NamedTuple

from mplug_jax.scenes import rendering
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
_ASKED = {"color": "color", "shape": "shape"}  # attribute -> word of the question, as in VQA v2


class Question(NamedTuple):
  """Question about a scene or a clip.

  Attributes:
    text: the question.
    answer: the only right answer.
    family: name of the kind of question, a key of FAMILIES for scenes.
    form: (kind, arguments...), evaluated by oracle.answer.
    unseen: True if the question names or asks for a held-out (shape, color) pair.
  """

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
  return [items[i] for i in rng.permutation(len(items)).tolist()]


def _unique(rng, scene, options):
  """Yields (object, description) in random order for objects that one of `options` singles out.

  Args:
    rng: generator of the questions.
    scene: the scene.
    options: tuples of attribute names, tried in random order.
  """
  for item in _shuffled(rng, scene.objects):
    for names in _shuffled(rng, options):
      desc = describe(item, names)
      if len(matching(scene, desc)) == 1:
        yield item, desc
        break


def _exist(rng, scene):
  wanted = _yes_no(rng)
  names = pick(rng, (("color", "shape"), ("color", "shape"), ("shape",), ("color",)))
  pairs = scenes.allowed_pairs(scene.config, scene.split)
  every = sorted({describe(Desc(None, color, shape), names) for shape, color in pairs})
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
  for item, desc in _unique(rng, scene, [("color", "shape")]):
    value = item.size if wanted else scenes.SIZES[item.size == "small"]
    return f"is {_the(desc)} {value}?", wanted, ("check", "size", value, desc), [item]
  return None


def _check(rng, scene):
  wanted = _yes_no(rng)
  for item, desc in _unique(rng, scene, [("shape",), ("size", "shape")]):
    colors = [c for s, c in scenes.allowed_pairs(scene.config, scene.split) if s == item.shape]
    value = item.color if wanted else pick(rng, [c for c in colors if c != item.color])
    form = ("check", "color", value, desc)
    return f"is {_the(desc)} {value}?", wanted, form, [item, desc._replace(color=value)]
  return None


def _two_unique(rng, scene):
  options = [("color", "shape"), ("size", "shape"), ("size", "color", "shape")]
  return list(_unique(rng, scene, options))[:2]


def _relation(rng, scene):
  wanted = _yes_no(rng)
  targets = _two_unique(rng, scene)
  if len(targets) < 2:
    return None
  (a, first), (b, second) = targets
  direction = pick(rng, related(scene, a, b))
  direction = direction if wanted else OPPOSITE[direction]
  text = f"is {_the(first)} {PHRASES[direction][0]} {_the(second)}?"
  return text, wanted, ("holds", direction, first, second), [a, b]


def _larger(rng, scene):
  wanted = _yes_no(rng)
  targets = list(_unique(rng, scene, [("color", "shape")]))
  pairs = [(a, b) for a in targets for b in targets if (a[0].size, b[0].size) == ("large", "small")]
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
  name = pick(rng, ("shape", "color"))
  values = scene.config.shapes if name == "shape" else scene.config.colors
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
  """Asks for the same color of two objects that differ in shape, or the other way round.

  If both attributes could differ or agree, the words about one would give the other away.
  """
  wanted = _yes_no(rng)
  asked, other = pick(rng, (("color", "shape"), ("shape", "color")))
  targets = list(_unique(rng, scene, [(other,), ("size", other)]))
  pairs = [(a, b) for a in targets for b in targets if getattr(a[0], other) != getattr(b[0], other)]
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


def _color(rng, scene):
  for item, desc in _unique(rng, scene, [("shape",), ("size", "shape")]):
    text = pick(rng, ("what color is {}?", "what is the color of {}?")).format(_the(desc))
    return text, item.color, ("attribute", "color", desc), [item]
  return None


def _shape(rng, scene):
  for item, desc in _unique(rng, scene, [("color",), ("size", "color")]):
    text = pick(rng, ("what shape is {}?", "what is the shape of {}?")).format(_the(desc))
    return text, item.shape, ("attribute", "shape", desc), [item]
  return None


def _position(rng, scene):
  middle = scene.config.size / 2
  margin = scene.config.margin
  for item, desc in _unique(rng, scene, [("color", "shape"), ("size", "shape")]):
    x, y = item.center
    if min(abs(x - middle), abs(y - middle)) > margin:
      answer = f"{'top' if y < middle else 'bottom'} {'left' if x < middle else 'right'}"
      text = pick(rng, ("in which corner is {}?", "which corner is {} closest to?"))
      return text.format(_the(desc)), answer, ("position", desc), [item]
  return None


def _neighbor(rng, scene):
  asked, other = pick(rng, (("color", "shape"), ("shape", "color")))
  for anchor, desc in _unique(rng, scene, [(other,), ("size", other)]):
    others = [o for o in scene.objects if o is not anchor]
    for direction in _shuffled(rng, DIRECTIONS):
      inside = [o for o in others if direction in related(scene, o, anchor)]
      outside = [o for o in others if OPPOSITE[direction] in related(scene, o, anchor)]
      if len(inside) == 1 and len(inside) + len(outside) == len(others):
        text = f"what {_ASKED[asked]} is the object {PHRASES[direction][0]} {_the(desc)}?"
        form = ("neighbor", asked, direction, desc)
        return text, getattr(inside[0], asked), form, [anchor, inside[0]]
  return None


def _extreme(rng, scene):
  asked = pick(rng, ("color", "shape"))
  for item in _shuffled(rng, scene.objects):
    ways = [set(related(scene, item, o)) for o in scene.objects if o is not item]
    directions = [d for d in DIRECTIONS if all(d in w for w in ways)]
    if directions:
      direction = pick(rng, directions)
      text = f"what {_ASKED[asked]} is the {_EXTREMES[direction]} object?"
      return text, getattr(item, asked), ("extreme", asked, direction), [item]
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
  "color": _color,
  "shape": _shape,
  "position": _position,
  "neighbor": _neighbor,
  "extreme": _extreme,
}
YES_NO_FAMILIES = ("exist", "size", "check", "relation", "larger", "more", "same")
MAX_QUESTIONS = 12
_SCARCE = ("same", "larger", "neighbor")  # few scenes allow these: tried first
_COMMON = tuple(f for f in FAMILIES if f not in _SCARCE)


def questions(scene: scenes.Scene, count: int = 8) -> list[Question]:
  """Returns `count` different questions about a scene, from as many families as possible.

  Raises:
    ValueError: not 0 < count <= MAX_QUESTIONS.
  """
  if not 0 < count <= MAX_QUESTIONS:
    raise ValueError(f"A scene has 1 to {MAX_QUESTIONS} questions, got count={count}.")
  rng = scenes.generator(scene.config, scene.split, scene.index, "questions")
  asked = {}
  while len(asked) < count:
    for family in [*_shuffled(rng, _SCARCE), *_shuffled(rng, _COMMON)]:
      drawn = FAMILIES[family](rng, scene)
      if drawn is not None and len(asked) < count:
        text, answer, form, about = drawn
        if isinstance(answer, bool):
          answer = "yes" if answer else "no"
        unseen = any(item.held_out for item in about)
        asked.setdefault(form, Question(text, answer, family, form, unseen))
  return list(asked.values())


class SceneVqaSource:
  """Random-access VQA records of a split, generated on access.

  A record: image u8[H, W, 3], image_id str, unseen bool (the image shows a held-out pair), and
  questions, a list of {question_id str, question, answers = [answer], weights = [1.0], ocr = "",
  objects = "", dataset = "scenes", family, unseen}.
  """

  def __init__(self, config: scenes.SceneConfig, split: str, questions_per_image: int = 8):
    self.config = config
    self.split = split
    self.questions_per_image = questions_per_image
    self._size = scenes.split_size(split)

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> dict:
    scene = scenes.scene(self.config, self.split, int(index))
    image_id = f"{self.split}-{index}"
    return {
      "image": rendering.render(scene, self.config),
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
