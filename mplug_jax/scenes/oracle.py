"""An oracle for procedural scenes: it judges logical forms on scene descriptions.

Its judgements share no code with the generators: it reads every form its own way, without labels or
answers, so a score of 100 says that the generator's texts are true, and a score below 100 (only
retrieval's) comes from texts that are true of several images.
"""

import itertools
import math

import numpy as np

from mplug_jax.scenes import pairs as scene_pairs
from mplug_jax.scenes import questions, text
from mplug_jax.scenes import scene as scenes


def _fits(thing, desc):
  return all(
    said is None or said == getattr(thing, name)
    for name, said in zip(("size", "colour", "shape"), desc, strict=True)
  )


def _candidates(scene, desc):
  return [o for o in scene.objects if _fits(o, desc)]


def _the(scene, desc):
  found = _candidates(scene, desc)
  if len(found) != 1:
    raise ValueError(
      f"{desc} fits {len(found)} objects of scene {scene.split}-{scene.index}, not "
      "one: ask about a single object"
    )
  return found[0]


def _relation(name, a, b, margin):
  """True, False or, for spatial relations within the margin, None."""
  if name.startswith("same_"):
    return getattr(a, name[5:]) == getattr(b, name[5:])
  if name in ("larger", "smaller"):
    return {"larger": ("large", "small"), "smaller": ("small", "large")}[name] == (a.size, b.size)
  axis = 0 if name in ("left", "right") else 1
  shift = sum(a.box[axis::2]) / 2 - sum(b.box[axis::2]) / 2  # > 0: a is more right or lower
  if abs(shift) <= margin:
    return None
  return (shift < 0) == (name in ("left", "above"))


def _assignments(statement, scene):
  """(objects, True / False / None) of every way to give the statement's places to objects."""
  options = [_candidates(scene, desc) for desc in statement.objects]
  for things in itertools.product(*options):
    if len(set(map(id, things))) == len(things):
      values = [
        _relation(name, things[i], things[j], scene.config.margin)
        for name, i, j in statement.relations
      ]
      yield things, False if False in values else None if None in values else True


def holds(statement: text.Statement, scene: scenes.Scene) -> bool | None:
  """Whether a statement is true of a scene; None = a centre is within the margin, in doubt."""
  values = [value for _, value in _assignments(statement, scene)]
  return True if True in values else None if None in values else False


def locate(statement: text.Statement, scene: scenes.Scene) -> tuple[int, int, int, int]:
  """Box (x1, y1, x2, y2) in pixels of the one object a referring expression can mean (place 0).

  Raises ValueError when it fits none or several, or when another object is a doubtful fit.
  """
  found = {things[0].box for things, value in _assignments(statement, scene) if value is not False}
  if len(found) != 1 or not holds(statement, scene):
    raise ValueError(
      f"{statement} refers to {len(found)} objects of scene {scene.split}-{scene.index}, not to one"
    )
  return found.pop()


def _yes(value):
  if value is None:
    raise ValueError("the answer is in doubt: two centres are within the margin")
  return "yes" if value else "no"


def _extreme(things, direction, margin):
  best = [
    a for a in things if all(_relation(direction, a, b, margin) for b in things if b is not a)
  ]
  if len(best) != 1:
    raise ValueError(f"no object is beyond doubt the outermost to the {direction}")
  return best[0]


def answer(form: tuple, scene: scenes.Scene) -> str:
  """The answer to a question's form (scene_questions.Question.form).

  Raises ValueError when the question's presupposition fails or the answer is in doubt, KeyError
  for an unknown kind.
  """
  kind, *rest = form
  margin = scene.config.margin

  def neighbour(name, direction, desc):
    anchor = _the(scene, desc)
    beside = [
      (o, _relation(direction, o, anchor, margin)) for o in scene.objects if o is not anchor
    ]
    hits = [o for o, value in beside if value is not False]
    if len(hits) != 1 or (hits[0], True) not in beside:
      raise ValueError(f"{len(hits)} objects can be {direction} of {desc}")
    return getattr(hits[0], name)

  def position(desc):
    x1, y1, x2, y2 = _the(scene, desc).box
    size = scene.config.size
    return f"{'top' if y1 + y2 < size else 'bottom'} {'left' if x1 + x2 < size else 'right'}"

  return {
    "exists": lambda desc: _yes(bool(_candidates(scene, desc))),
    "count": lambda desc: str(len(_candidates(scene, desc))),
    "attribute": lambda name, desc: getattr(_the(scene, desc), name),
    "check": lambda name, value, desc: _yes(getattr(_the(scene, desc), name) == value),
    "holds": lambda name, a, b: _yes(_relation(name, _the(scene, a), _the(scene, b), margin)),
    "more": lambda a, b: _yes(len(_candidates(scene, a)) > len(_candidates(scene, b))),
    "neighbour": neighbour,
    "position": position,
    "extreme": lambda name, way: getattr(_extreme(scene.objects, way, margin), name),
  }[kind](*rest)


def judge_pair(form: tuple, left: scenes.Scene, right: scenes.Scene) -> bool:
  """Truth of a form of scene_pairs.Pair. Raises ValueError when an image leaves it in doubt."""
  kind, content = form
  if isinstance(content, text.Statement):
    values = [holds(content, scene) for scene in (left, right)]
    if None in values:
      raise ValueError(f"{content} is in doubt for an image of the pair")
  else:
    values = [len(_candidates(scene, content)) for scene in (left, right)]
  a, b = values
  return {
    "both": bool(a and b),
    "one": bool(a) != bool(b),
    "left_only": bool(a and not b),
    "right_only": bool(b and not a),
    "any": bool(a or b),
    "neither": not a and not b,
    "more_left": a > b,
    "more_right": b > a,
    "same": a == b,
    "two": a + b == 2,
    "three": a + b == 3,
  }[kind]


def judge_entailment(statement: text.Statement, scene: scenes.Scene) -> str:
  """Label of a hypothesis. Raises ValueError when the relation is in doubt."""
  if any(not _candidates(scene, desc) for desc in statement.objects):
    return "neutral"
  value = holds(statement, scene)
  return {"yes": "entailment", "no": "contradiction"}[_yes(value)]


def _motion(first, last):
  dx, dy = last.box[0] - first.box[0], last.box[1] - first.box[1]
  if not dx and not dy:
    return "still"
  return ("right" if dx > 0 else "left") if dx else "down" if dy > 0 else "up"


def answer_clip(form: tuple, frames: tuple[scenes.Scene, ...]) -> str:
  """The answer to a question about a clip, from its first and last frames. Raises as `answer`."""
  first, last = frames[0], frames[-1]
  motions = [_motion(a, b) for a, b in zip(first.objects, last.objects, strict=True)]
  kind, *rest = form
  if kind == "finally":
    return answer(("holds", *rest), last)
  if kind == "mover":
    name, direction = rest
    return getattr(first.objects[motions.index(direction)], name)
  motion = motions[first.objects.index(_the(first, rest[0]))]
  return {"direction": motion, "moves": _yes(motion != "still")}[kind]


def holds_clip(form: tuple, frames: tuple[scenes.Scene, ...]) -> bool:
  """Truth of a clip caption's form: some distinct objects fit and move as it says."""
  pairs = [list(zip(frames[0].objects, frames[-1].objects, strict=True))] * len(form)
  return any(
    len(set(first for first, _ in chosen)) == len(form)
    and all(
      _fits(first, desc) and _motion(first, last) == way
      for (first, last), (desc, way) in zip(chosen, form, strict=True)
    )
    for chosen in itertools.product(*pairs)
  )


def consistency(
  config: scenes.SceneConfig, split: str, images: int, captions_per_image: int = 5
) -> np.ndarray:
  """bool[images x captions_per_image, images]: which captions are true of which images, for the
  first `images` scenes of a split; caption i belongs to image i // captions_per_image."""
  found = [scenes.scene(config, split, i) for i in range(images)]
  showing = {}  # description -> numbers of the scenes with such an object
  for scene in found:
    for o in scene.objects:
      for said in itertools.product((True, False), repeat=3):
        desc = tuple(v if s else None for v, s in zip(o[:3], said, strict=True))
        showing.setdefault(desc, set()).add(scene.index)
  table = np.zeros((images * captions_per_image, images), bool)
  forms = [c.form for s in found for c in text.caption_forms(s, captions_per_image)]
  for row, form in enumerate(forms):
    for i in set.intersection(*(showing[tuple(desc)] for desc in form.objects)):
      table[row, i] = holds(form, found[i]) is True
  return table


def retrieval(table: np.ndarray) -> dict[str, float]:
  """Expected recall in percent of an oracle that knows which captions are true of which images.

  Text to image: an image drawn from the consistent ones, ties at random, so R@k is the mean of
  min(k / |consistent|, 1). Image to text: true captions, those true of the fewest images first (the
  likeliest to be written about this one), ties at random; a hit = one of the image's own.

  Args:
    table: bool[N x captions, N] of `consistency`.

  Returns:
    {"text_to_image_r1", "..._r5", "..._r10", "image_to_text_r1", "..._r5", "..._r10"}.
  """
  rows, images = table.shape
  per_image = rows // images
  ambiguity = table.sum(1)
  result = {}
  for k in (1, 5, 10):
    result[f"text_to_image_r{k}"] = 100 * float(np.minimum(k / ambiguity, 1).mean())
    hits = [
      1 - _miss(ambiguity[table[:, i]], np.flatnonzero(table[:, i]) // per_image == i, k)
      for i in range(images)
    ]
    result[f"image_to_text_r{k}"] = 100 * float(np.mean(hits))
  return result


def _miss(ambiguity, own, k):
  """Chance that none of the first k captions is the image's own, ranked by ambiguity i64[M], ties
  at random; own bool[M]."""
  for level in np.unique(ambiguity):
    tied, good = int((ambiguity == level).sum()), int(own[ambiguity == level].sum())
    taken = min(k, tied)
    if good:  # nothing after this level matters: if k reaches further, it has a hit already
      return math.comb(tied - good, taken) / math.comb(tied, taken)
    k -= taken
    if k == 0:
      return 1.0
  return 1.0


def attainable(config: scenes.SceneConfig, split: str, count: int) -> dict[str, float]:
  """The oracle's score in percent for each task on the first `count` records of a split: vqa,
  grounding (box found exactly), nlvr2, entailment, and the recalls of `retrieval` over `count`
  images."""
  vqa, grounding, pairs, labels = [], [], [], []
  for i in range(count):
    scene = scenes.scene(config, split, i)
    vqa += [answer(q.form, scene) == q.answer for q in questions.questions(scene)]
    grounding += [locate(r["form"], scene) == r["box"] for r in text.referring(scene)]
    pair = scene_pairs.pair(config, split, i)
    pairs.append(judge_pair(pair.form, pair.left, pair.right) == pair.label)
    triple = scene_pairs.entailment(config, split, i)
    labels.append(judge_entailment(triple.form, triple.premise) == triple.label)
  scores = {"vqa": vqa, "grounding": grounding, "nlvr2": pairs, "entailment": labels}
  return {name: 100 * float(np.mean(hits)) for name, hits in scores.items()} | retrieval(
    consistency(config, split, count)
  )
