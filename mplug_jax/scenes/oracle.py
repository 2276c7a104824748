"""Oracle for procedural scenes: evaluates logical forms on scene descriptions.

The oracle shares no code with the generators and reads neither labels nor answers. A score of 100
therefore means that the generated texts are true. Only retrieval scores less, because some captions
are true of several images.
"""

import itertools
import math

import numpy as np

from mplug_jax.scenes import pairs as scene_pairs
from mplug_jax.scenes import questions, text
from mplug_jax.scenes import scene as scenes


def _fits(item, desc):
  return all(
    value is None or value == getattr(item, name)
    for name, value in zip(("size", "color", "shape"), desc, strict=True)
  )


def _candidates(scene, desc):
  return [o for o in scene.objects if _fits(o, desc)]


def _the(scene, desc):
  objects = _candidates(scene, desc)
  if len(objects) != 1:
    raise ValueError(
      f"{desc} fits {len(objects)} objects of scene {scene.split}-{scene.index}; it must fit one."
    )
  return objects[0]


def _relation(name, a, b, margin):
  """Returns the truth of a relation, None for a spatial relation within the margin."""
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
  """Yields (objects, True / False / None) for every assignment of objects to a statement."""
  options = [_candidates(scene, desc) for desc in statement.objects]
  for objects in itertools.product(*options):
    if len(set(map(id, objects))) == len(objects):
      values = [
        _relation(name, objects[i], objects[j], scene.config.margin)
        for name, i, j in statement.relations
      ]
      yield objects, False if False in values else None if None in values else True


def holds(statement: text.Statement, scene: scenes.Scene) -> bool | None:
  """Returns whether a statement is true of a scene; None if a center is within the margin."""
  values = [value for _, value in _assignments(statement, scene)]
  return True if True in values else None if None in values else False


def locate(statement: text.Statement, scene: scenes.Scene) -> tuple[int, int, int, int]:
  """Returns the box (x1, y1, x2, y2) in pixels of the object of a referring expression.

  Args:
    statement: form of the expression; its object 0 is the target.
    scene: the scene.

  Raises:
    ValueError: the expression fits no object or several, or another object is a doubtful fit.
  """
  boxes = {
    objects[0].box for objects, value in _assignments(statement, scene) if value is not False
  }
  if len(boxes) != 1 or not holds(statement, scene):
    raise ValueError(
      f"{statement} refers to {len(boxes)} objects of scene {scene.split}-{scene.index}, not one."
    )
  return boxes.pop()


def _yes(value):
  if value is None:
    raise ValueError("The answer is in doubt: two centers are within the margin.")
  return "yes" if value else "no"


def _extreme(objects, direction, margin):
  best = [
    a for a in objects if all(_relation(direction, a, b, margin) for b in objects if b is not a)
  ]
  if len(best) != 1:
    raise ValueError(f"No single object is clearly outermost in direction {direction!r}.")
  return best[0]


def answer(form: tuple, scene: scenes.Scene) -> str:
  """Returns the answer to a question.

  Args:
    form: Question.form.
    scene: the scene.

  Raises:
    ValueError: the presupposition of the question fails, or the answer is in doubt.
    KeyError: unknown kind of question.
  """
  kind, *rest = form
  margin = scene.config.margin

  def neighbor(name, direction, desc):
    anchor = _the(scene, desc)
    beside = [
      (o, _relation(direction, o, anchor, margin)) for o in scene.objects if o is not anchor
    ]
    hits = [o for o, value in beside if value is not False]
    if len(hits) != 1 or (hits[0], True) not in beside:
      raise ValueError(f"{len(hits)} objects can be {direction} of {desc}; it must be one.")
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
    "neighbor": neighbor,
    "position": position,
    "extreme": lambda name, way: getattr(_extreme(scene.objects, way, margin), name),
  }[kind](*rest)


def judge_pair(form: tuple, left: scenes.Scene, right: scenes.Scene) -> bool:
  """Returns the truth of Pair.form.

  Raises:
    ValueError: the truth is in doubt for one of the images.
  """
  kind, content = form
  if isinstance(content, text.Statement):
    a = holds(content, left)
    b = holds(content, right)
    if a is None or b is None:
      raise ValueError(f"{content} is in doubt for an image of the pair.")
  else:
    a = len(_candidates(left, content))
    b = len(_candidates(right, content))
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
  """Returns the label of a hypothesis, one of pairs.LABELS.

  Raises:
    ValueError: the relation is in doubt.
  """
  if any(not _candidates(scene, desc) for desc in statement.objects):
    return "neutral"
  value = holds(statement, scene)
  return {"yes": "entailment", "no": "contradiction"}[_yes(value)]


def _motion(first, last):
  dx = last.box[0] - first.box[0]
  dy = last.box[1] - first.box[1]
  if not dx and not dy:
    return "still"
  return ("right" if dx > 0 else "left") if dx else "down" if dy > 0 else "up"


def answer_clip(form: tuple, frames: tuple[scenes.Scene, ...]) -> str:
  """Returns the answer to a question about a clip, from its first and last frames, as `answer`."""
  first = frames[0]
  last = frames[-1]
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
  """Returns the truth of ClipCaption.form: some distinct objects fit and move accordingly."""
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
  """Returns bool[images x captions_per_image, images]: whether caption i is true of image j.

  Args:
    config: of the scenes.
    split: "train", "val" or "test".
    images: number of scenes, from the first.
    captions_per_image: captions of each; caption i belongs to image i // captions_per_image.
  """
  sampled = [scenes.scene(config, split, i) for i in range(images)]
  showing = {}  # description -> numbers of the scenes with such an object
  for scene in sampled:
    for o in scene.objects:
      for mentioned in itertools.product((True, False), repeat=3):
        desc = tuple(v if m else None for v, m in zip(o[:3], mentioned, strict=True))
        showing.setdefault(desc, set()).add(scene.index)
  table = np.zeros((images * captions_per_image, images), bool)
  forms = [c.form for s in sampled for c in text.caption_forms(s, captions_per_image)]
  for row, form in enumerate(forms):
    for i in set.intersection(*(showing[tuple(desc)] for desc in form.objects)):
      table[row, i] = holds(form, sampled[i]) is True
  return table


def retrieval(table: np.ndarray) -> dict[str, float]:
  """Returns the expected recall in percent of an oracle with the table of true captions.

  Text to image: the oracle ranks the consistent images first, in random order, so R@k is the mean
  of min(k / |consistent|, 1). Image to text: it ranks the true captions by the number of images
  they are true of, fewest first, ties at random; a hit is a caption written for the image.

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


def _miss(ambiguity, written, k):
  """Returns the probability that none of the first k captions was written for the image.

  Args:
    ambiguity: i64[M], images that each true caption fits; the rank, ties at random.
    written: bool[M], captions written for the image.
    k: number of captions.
  """
  for level in np.unique(ambiguity):
    tied = int((ambiguity == level).sum())
    good = int(written[ambiguity == level].sum())
    taken = min(k, tied)
    if good:  # nothing after this level matters: if k reaches further, it has a hit already
      return math.comb(tied - good, taken) / math.comb(tied, taken)
    k -= taken
    if k == 0:
      return 1.0
  return 1.0


def attainable(config: scenes.SceneConfig, split: str, count: int) -> dict[str, float]:
  """Returns the oracle's scores in percent on the first `count` records of a split.

  The keys are vqa, grounding (exact boxes), nlvr2, entailment and those of `retrieval`.
  """
  vqa: list[bool] = []
  grounding: list[bool] = []
  pairs: list[bool] = []
  labels: list[bool] = []
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
