"""Texts about procedural scenes: captions and referring expressions, each with its logical form.

A text comes with a form, a `Statement`, which says what the text claims without words; the
evaluator of scene_oracle.py judges forms on scene descriptions, so a wrong text is found rather
than believed. Spatial relations compare the centres of boxes and are claimed only when these
differ by `config.margin` pixels. No text of train or val names a pair of `scenes.HELD_OUT`.
"""

import itertools
from typing import NamedTuple

import numpy as np

from mplug_jax.scenes import scene as scenes

DIRECTIONS = ("left", "right", "above", "below")
OPPOSITE = {
  "left": "right",
  "right": "left",
  "above": "below",
  "below": "above",
  "larger": "smaller",
  "smaller": "larger",
}
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
  "colour": (  # a and b share their colour
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
_CAPTION_DETAILS = (  # with repetition: how often
  *[("size", "colour", "shape")] * 3,
  *[("colour", "shape")] * 2,
  ("size", "shape"),
)
_DETAILS = (("colour", "shape"), ("size", "shape"), ("size", "colour", "shape"))


class Desc(NamedTuple):
  """What is said of one object; None = unsaid."""

  size: str | None = None
  colour: str | None = None
  shape: str | None = None

  @property
  def held_out(self) -> bool:
    return (self.shape, self.colour) in scenes.HELD_OUT


class Statement(NamedTuple):
  """There are distinct objects that fit `objects` and stand in `relations` = (name, i, j)."""

  objects: tuple[Desc, ...]
  relations: tuple[tuple[str, int, int], ...] = ()


class Caption(NamedTuple):
  """`template` = (kind, number). `unseen`: the text names a held-out (shape, colour) pair."""

  text: str
  form: Statement
  template: tuple[str, int]
  unseen: bool


def pick(rng: np.random.Generator, options):
  """One of a sequence, uniformly."""
  return options[int(rng.integers(len(options)))]


class Words:
  """The choice of words for one text: a thing is called by the same word throughout, so that
  "tiny" beside "small" never hints at two sizes. Without rng, the plain word of each list."""

  def __init__(self, rng: np.random.Generator | None = None):
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
    """A description without its article, e.g. "large red circle"."""
    words = [self._word(w) for w in desc if w is not None]
    phrase = " ".join(words if desc.shape else [*words, self._word("object")])
    if not plural:
      return phrase
    return phrase + ("es" if phrase.endswith(("s", "x")) else "s")

  def relation(self, name: str) -> str:
    """A phrase of `PHRASES`; may differ from one use to the next."""
    return PHRASES[name][0] if self._rng is None else pick(self._rng, PHRASES[name])


def with_article(phrase: str) -> str:
  """ "a red circle", "an orange circle"."""
  return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def describe(thing: scenes.Object, names) -> Desc:
  """The description of an object by the attributes in `names`."""
  return Desc(**{name: getattr(thing, name) for name in names})


def matching(scene: scenes.Scene, desc: Desc) -> list[scenes.Object]:
  """The objects of a scene that fit a description."""
  size, colour, shape = desc
  return [
    o
    for o in scene.objects
    if size in (None, o.size) and colour in (None, o.colour) and shape in (None, o.shape)
  ]


def related(scene: scenes.Scene, a: scenes.Object, b: scenes.Object) -> list[str]:
  """Directions beyond doubt in which a lies from b."""
  (ax, ay), (bx, by), margin = a.centre, b.centre, scene.config.margin
  offsets = (bx - ax, ax - bx, by - ay, ay - by)  # the order of DIRECTIONS
  return [d for d, offset in zip(DIRECTIONS, offsets, strict=True) if offset > margin]


def _draw_statement(rng, scene, kind):
  """(objects, names to describe them by, relations) of a kind of caption, None if it has none."""
  count = 3 if kind in ("fork", "chain", "both") else 2
  if len(scene.objects) < count:
    return None
  things = [scene.objects[i] for i in rng.permutation(len(scene.objects))[:count]]
  a, b = things[:2]
  if kind == "colour":
    return (things, ("size", "shape"), (("same_colour", 0, 1),)) if a.colour == b.colour else None
  if kind == "shape":
    return (things, ("size", "colour"), (("same_shape", 0, 1),)) if a.shape == b.shape else None
  if kind == "size":
    if a.size == b.size:
      return None
    relation = "larger" if a.size == "large" else "smaller"
    return things, ("colour", "shape"), ((relation, 0, 1),)
  ends = {
    "pair": ((0, 1),),
    "fork": ((0, 1), (0, 2)),
    "chain": ((0, 1), (1, 2)),
    "both": ((0, 2), (1, 2)),
  }[kind]
  options = [related(scene, things[i], things[j]) for i, j in ends]
  if kind == "both":
    options = [[r for r in options[0] if r in options[1]]] * 2
  if not all(options):
    return None
  names = [pick(rng, options[0])]
  if count == 3:
    names.append(names[0] if kind == "both" else pick(rng, options[1]))
  relations = tuple((name, i, j) for name, (i, j) in zip(names, ends, strict=True))
  return things, pick(rng, _CAPTION_DETAILS), relations


def _draw_caption(rng, scene):
  kind, number = pick(rng, [(k, i) for k, t in TEMPLATES.items() for i in range(len(t))])
  drawn = _draw_statement(rng, scene, kind)
  if drawn is None:
    return None
  things, names, relations = drawn
  form = Statement(tuple(describe(o, names) for o in things), relations)
  if len(set(form.objects)) < len(form.objects):
    return None  # "a red square above a red square" says little
  words = Words(rng)
  slots = dict(zip("abc", (with_article(words.say(d)) for d in form.objects), strict=False))
  if kind not in ("colour", "shape"):
    first, last = relations[0][0], relations[-1][0]
    slots["r"], slots["s"] = words.relation(first), words.relation(last)
    slots["R"], slots["x"] = words.relation(OPPOSITE[first]), slots["r"].split()[0]
  text = TEMPLATES[kind][number].format(**slots)
  return Caption(text, form, (kind, number), any(d.held_out for d in form.objects))


def caption_forms(scene: scenes.Scene, count: int = 5) -> list[Caption]:
  """`count` captions of a scene with different templates, true of it, in a fixed order: asking
  for more adds to the end. Raises ValueError above 8, where small scenes run out."""
  if count > 8:
    raise ValueError(f"{count} captions of one scene: ask for at most 8")
  rng = scenes.generator(scene.config, scene.split, scene.index, "captions")
  found = {}
  while len(found) < count:
    caption = _draw_caption(rng, scene)
    if caption is not None:
      found.setdefault(caption.template, caption)
  return list(found.values())


def captions(scene: scenes.Scene, count: int = 5) -> list[str]:
  """The texts of `caption_forms`. With count = 6 the last is a sixth caption of the same source,
  whose score against the first five is what a captioning model can attain."""
  return [c.text for c in caption_forms(scene, count)]


def _shares(a, b):
  return a.shape == b.shape or a.colour == b.colour


def _plain_expressions(scene):
  """(target, Statement): attributes alone single the target out."""
  for target in scene.objects:
    if not any(_shares(target, o) for o in scene.objects if o is not target):
      continue
    for names in (*_DETAILS, ("size", "colour")):
      desc = describe(target, names)
      if len(matching(scene, desc)) == 1:
        yield target, Statement((desc,))


def _relational_expressions(scene, clauses=1):
  """[(target, Statement)]: the target's own words fit several objects, `clauses` relations to
  singled out anchors leave one, and no other candidate is near the margin.

  More clauses are used only where fewer find nothing; one for each rival, with that rival as the
  anchor, always suffice.
  """
  anchors = []
  for anchor in scene.objects:
    descs = [describe(anchor, names) for names in _DETAILS]
    anchors.append((anchor, next(d for d in descs if len(matching(scene, d)) == 1)))
  found = []
  for target in scene.objects:
    facts = [
      (anchor, desc, direction)
      for anchor, desc in anchors
      for direction in related(scene, target, anchor)
    ]
    for names in (("shape",), ("colour",), *_DETAILS[:2]):
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
          found.append((target, Statement((head, *(fact[1] for fact in chosen)), relations)))
  return found or _relational_expressions(scene, clauses + 1)


def referring(scene: scenes.Scene, count: int = 2) -> list[dict]:
  """Referring expressions, by turns with and without a needed relation.

  The target always has a distractor of its shape or its colour; in a `needs_relation` expression
  the words before the relation fit two objects or more.

  Returns `count` dicts: text, form (a Statement whose object 0 is the target), box (x1, y1, x2,
  y2) in pixels with x2 and y2 exclusive, target (index in scene.objects), needs_relation,
  unseen (the target or the anchor is a held-out pair).
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
