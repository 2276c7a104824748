"""Texts about procedural scenes: captions and referring expressions, each with its logical form.

The form of a text is a `Statement`, its claim without words. oracle.py evaluates forms on scene
descriptions and so detects wrong texts. Spatial relations compare the centers of boxes and are used
only when these differ by more than `config.margin` pixels. No text of train or val names a pair of
`scene.HELD_OUT`.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from mplug_jax.scenes import scene as scenes

DIRECTIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "above": "below", "larger": "smaller"}
OPPOSITE |= {second: first for first, second in OPPOSITE.items()}
PHRASES = {  # the first is the one of questions
  "left": ("to the left of", "left of", "on the left of", "on the left side of"),
  "right": ("to the right of", "right of", "on the right of", "on the right side of"),
  "above": ("above", "over"),
  "below": ("below", "under", "beneath"),
  "larger": ("larger than", "bigger than"),
  "smaller": ("smaller than",),
}
SYNONYMS = {
  "small": ("small", "little", "tiny"),
  "large": ("large", "big"),
  "purple": ("purple", "violet"),
  "circle": ("circle", "disc"),
  "diamond": ("diamond", "rhombus"),
  "cross": ("cross", "plus sign"),
  "object": ("object", "thing"),
}

# a, b, c: objects; r, s: relation phrases; R: the opposite of r. Kind -> templates.
TEMPLATES = {
  "pair": (  # a r b
    "{a} is {r} {b}",
    "there is {a} {r} {b}",
    "{a} sits {r} {b}",
    "{a} lies {r} {b}",
    "{a} is drawn {r} {b}",
    "{a} can be seen {r} {b}",
    "one can see {a} {r} {b}",
    "the picture shows {a} {r} {b}",
    "an image of {a} {r} {b}",
    "a drawing of {a} {r} {b}",
    "{a} appears {r} {b}",
    "{r} {b} there is {a}",
    "{r} {b} sits {a}",
    "{r} {b} one finds {a}",
    "{a} with {b} {R} it",
    "there is {a} with {b} {R} it",
    "we find {a} {r} {b}",
    "in this image {a} is {r} {b}",
    "{a} is located {r} {b}",
    "{a} is positioned {r} {b}",
    "{a} and {b}, the former {r} the latter",
    "the scene contains {a} {r} {b}",
  ),
  "size": (  # a is larger or smaller than b
    "{a} is {r} {b}",
    "there is {a} that is {r} {b}",
    "the picture shows {a} {r} {b}",
    "compared with {b}, {a} is {x}",
    "{a} and {b}, the former {r} the latter",
    "one can see {a} which is {r} {b}",
  ),
  "color": (  # a and b share their color
    "{a} has the same color as {b}",
    "{a} and {b} have the same color",
    "there are {a} and {b} of the same color",
    "{a} and {b} share one color",
    "the picture shows {a} with the color of {b}",
  ),
  "shape": (  # a and b share their shape
    "{a} has the same shape as {b}",
    "{a} and {b} have the same shape",
    "there are {a} and {b} of the same shape",
  ),
  "fork": (  # a r b and a s c
    "{a} is {r} {b} and {s} {c}",
    "there is {a} {r} {b} and {s} {c}",
    "{a} sits {r} {b} and {s} {c}",
    "{a} can be seen {r} {b} and {s} {c}",
    "the picture shows {a} that is {r} {b} and {s} {c}",
    "in this image {a} lies {r} {b} and {s} {c}",
    "{a} is both {r} {b} and {s} {c}",
  ),
  "chain": (  # a r b and b s c
    "{a} is {r} {b}, which is {s} {c}",
    "there is {a} {r} {b} that lies {s} {c}",
    "{a} sits {r} {b} which is {s} {c}",
    "the picture shows {a} {r} {b}, the latter {s} {c}",
    "an image of {a} {r} {b} that is {s} {c}",
  ),
  "both": (  # a r c and b r c
    "{a} and {b} are {r} {c}",
    "{a} and {b} are both {r} {c}",
    "both {a} and {b} lie {r} {c}",
    "{r} {c} there are {a} and {b}",
  ),
}
TEMPLATE_COUNT = sum(map(len, TEMPLATES.values()))
_CAPTION_DETAILS = (  # repeated in proportion to their frequency
  *[("size", "color", "shape")] * 3,
  *[("color", "shape")] * 2,
  ("size", "shape"),
)
_DETAILS = (("color", "shape"), ("size", "shape"), ("size", "color", "shape"))


class Desc(NamedTuple):
  """Description of one object; None = the attribute is not mentioned."""

  size: str | None = None
  color: str | None = None
  shape: str | None = None

  @property
  def held_out(self) -> bool:
    """True for a (shape, color) pair that training never shows."""
    return (self.shape, self.color) in scenes.HELD_OUT


class Statement(NamedTuple):
  """Claim that distinct objects of these descriptions and relations exist.

  Attributes:
    objects: descriptions.
    relations: of (name, i, j): object i is in this relation to object j.
  """

  objects: tuple[Desc, ...]
  relations: tuple[tuple[str, int, int], ...] = ()


class Caption(NamedTuple):
  """Caption of a scene.

  Attributes:
    text: the caption.
    form: its claim.
    template: (kind, index) into TEMPLATES.
    unseen: True if the text names a held-out (shape, color) pair.
  """

  text: str
  form: Statement
  template: tuple[str, int]
  unseen: bool


_Option = TypeVar("_Option")


def pick(rng: np.random.Generator, options: Sequence[_Option]) -> _Option:
  """Draws one element of a sequence uniformly."""
  return options[int(rng.integers(len(options)))]


class Words:
  """Choice of synonyms for one text.

  An attribute keeps its word throughout a text, so that "tiny" next to "small" never hints at two
  sizes.
  """

  def __init__(self, rng: np.random.Generator | None = None):
    """Starts a text.

    Args:
      rng: draws the synonyms; None = the first word of each list.
    """
    self._rng = rng
    self._chosen = {}

  def _word(self, word):
    options = SYNONYMS.get(word, (word,))
    if self._rng is None:
      return options[0]
    if word not in self._chosen:
      self._chosen[word] = pick(self._rng, options)
    return self._chosen[word]

  def say(self, desc: Desc, plural: bool = False) -> str:
    """Returns a description without an article, e.g. "large red circle"."""
    words = [self._word(w) for w in desc if w is not None]
    phrase = " ".join(words if desc.shape else [*words, self._word("object")])
    if not plural:
      return phrase
    return phrase + ("es" if phrase.endswith(("s", "x")) else "s")

  def relation(self, name: str) -> str:
    """Returns a phrase of PHRASES; repeated calls may differ."""
    return PHRASES[name][0] if self._rng is None else pick(self._rng, PHRASES[name])


def with_article(phrase: str) -> str:
  """Returns the phrase with its article: "a red circle", "an orange circle"."""
  return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def describe(item: scenes.Object | Desc, names: Iterable[str]) -> Desc:
  """Returns the description of an object by the attributes in `names`."""
  return Desc(**{name: getattr(item, name) for name in names})


def matching(scene: scenes.Scene, desc: Desc) -> list[scenes.Object]:
  """Returns the objects of a scene that fit a description."""
  size, color, shape = desc
  return [
    o
    for o in scene.objects
    if size in (None, o.size) and color in (None, o.color) and shape in (None, o.shape)
  ]


def related(scene: scenes.Scene, a: scenes.Object, b: scenes.Object) -> list[str]:
  """Returns the unambiguous directions of a as seen from b."""
  ax, ay = a.center
  bx, by = b.center
  margin = scene.config.margin
  offsets = (bx - ax, ax - bx, by - ay, ay - by)  # the order of DIRECTIONS
  return [d for d, offset in zip(DIRECTIONS, offsets, strict=True) if offset > margin]


def _draw_statement(rng, scene, kind):
  """Draws (objects, names of described attributes, relations), None if the kind does not fit."""
  count = 3 if kind in ("fork", "chain", "both") else 2
  if len(scene.objects) < count:
    return None
  objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))[:count]]
  a, b = objects[:2]
  if kind == "color":
    return (objects, ("size", "shape"), (("same_color", 0, 1),)) if a.color == b.color else None
  if kind == "shape":
    return (objects, ("size", "color"), (("same_shape", 0, 1),)) if a.shape == b.shape else None
  if kind == "size":
    if a.size == b.size:
      return None
    relation = "larger" if a.size == "large" else "smaller"
    return objects, ("color", "shape"), ((relation, 0, 1),)
  ends = {
    "pair": ((0, 1),),
    "fork": ((0, 1), (0, 2)),
    "chain": ((0, 1), (1, 2)),
    "both": ((0, 2), (1, 2)),
  }[kind]
  options = [related(scene, objects[i], objects[j]) for i, j in ends]
  if kind == "both":
    options = [[r for r in options[0] if r in options[1]]] * 2
  if not all(options):
    return None
  names = [pick(rng, options[0])]
  if count == 3:
    names.append(names[0] if kind == "both" else pick(rng, options[1]))
  relations = tuple((name, i, j) for name, (i, j) in zip(names, ends, strict=True))
  return objects, pick(rng, _CAPTION_DETAILS), relations


def _draw_caption(rng, scene):
  kind, number = pick(rng, [(k, i) for k, t in TEMPLATES.items() for i in range(len(t))])
  drawn = _draw_statement(rng, scene, kind)
  if drawn is None:
    return None
  objects, names, relations = drawn
  form = Statement(tuple(describe(o, names) for o in objects), relations)
  if len(set(form.objects)) < len(form.objects):
    return None  # "a red square above a red square" is too vague
  words = Words(rng)
  slots = dict(zip("abc", (with_article(words.say(d)) for d in form.objects), strict=False))
  if kind not in ("color", "shape"):
    first = relations[0][0]
    slots |= {"r": words.relation(first), "s": words.relation(relations[-1][0])}
    slots |= {"R": words.relation(OPPOSITE[first]), "x": slots["r"].split()[0]}
  text = TEMPLATES[kind][number].format(**slots)
  return Caption(text, form, (kind, number), any(d.held_out for d in form.objects))


def caption_forms(scene: scenes.Scene, count: int = 5) -> list[Caption]:
  """Returns `count` true captions of a scene with different templates.

  The order is fixed: a larger count appends.

  Raises:
    ValueError: count > 8; small scenes have no more.
  """
  if count > 8:
    raise ValueError(f"A scene has at most 8 captions, got count={count}.")
  rng = scenes.generator(scene.config, scene.split, scene.index, "captions")
  drawn = {}
  while len(drawn) < count:
    caption = _draw_caption(rng, scene)
    if caption is not None:
      drawn.setdefault(caption.template, caption)
  return list(drawn.values())


def captions(scene: scenes.Scene, count: int = 5) -> list[str]:
  """Returns the texts of `caption_forms`.

  The score of a sixth caption against the first five is the upper bound of a captioning model.
  """
  return [c.text for c in caption_forms(scene, count)]


def _shares(a, b):
  return a.shape == b.shape or a.color == b.color


def _plain_expressions(scene):
  """Yields (target, Statement) for objects that attributes alone single out."""
  for target in scene.objects:
    if not any(_shares(target, o) for o in scene.objects if o is not target):
      continue
    for names in (*_DETAILS, ("size", "color")):
      desc = describe(target, names)
      if len(matching(scene, desc)) == 1:
        yield target, Statement((desc,))


def _relational_expressions(scene, clauses=1):
  """Returns [(target, Statement)] whose relations single the target out.

  The description of the target fits several objects, `clauses` relations to unique anchors leave
  one, and no other candidate is within the margin. More clauses are used only if fewer yield
  nothing; one per rival, with the rival as the anchor, always suffices.
  """
  anchors = []
  for anchor in scene.objects:
    descs = [describe(anchor, names) for names in _DETAILS]
    anchors.append((anchor, next(d for d in descs if len(matching(scene, d)) == 1)))
  expressions = []
  for target in scene.objects:
    facts = [
      (anchor, desc, direction)
      for anchor, desc in anchors
      for direction in related(scene, target, anchor)
    ]
    for names in (("shape",), ("color",), *_DETAILS[:2]):
      head = describe(target, names)
      rivals = [o for o in matching(scene, head) if o is not target]
      if not any(_shares(target, o) for o in rivals):
        continue
      for chosen in itertools.combinations(facts, clauses):
        if all(
          any(
            o is anchor or OPPOSITE[direction] in related(scene, o, anchor)
            for anchor, _, direction in chosen
          )
          for o in rivals
        ):
          relations = tuple((fact[2], 0, j + 1) for j, fact in enumerate(chosen))
          expressions.append((target, Statement((head, *(fact[1] for fact in chosen)), relations)))
  return expressions or _relational_expressions(scene, clauses + 1)


def referring(scene: scenes.Scene, count: int = 2) -> list[dict]:
  """Returns referring expressions, alternately with and without a necessary relation.

  The target always has a distractor of its shape or color. In a `needs_relation` expression the
  words before the relation fit at least two objects.

  Args:
    scene: the scene.
    count: number of expressions.

  Returns:
    `count` dicts: text, form (a Statement whose object 0 is the target), box (x1, y1, x2, y2) in
    pixels with x2 and y2 exclusive, target (index in scene.objects), needs_relation, unseen (the
    target or the anchor is a held-out pair).
  """
  rng = scenes.generator(scene.config, scene.split, scene.index, "referring")
  options = [_relational_expressions(scene), list(_plain_expressions(scene))]
  results = []
  for i in range(count):
    needs_relation = (scene.index + i) % 2 == 0
    target, form = pick(rng, options[not needs_relation])
    words = Words(rng)
    nouns = ["the " + words.say(desc) for desc in form.objects]
    clauses = [f"{words.relation(name)} {nouns[j]}" for name, _, j in form.relations]
    named = [target, *(o for desc in form.objects[1:] for o in matching(scene, desc))]
    results.append(
      {
        "text": " ".join([nouns[0], *clauses[:1], *(f"and {c}" for c in clauses[1:])]),
        "form": form,
        "box": target.box,
        "target": scene.objects.index(target),
        "needs_relation": needs_relation,
        "unseen": any(o.held_out for o in named),
      }
    )
  return results
