"""Short clips: one or two objects of a scene move in a straight line, the others stay.

Moving objects never touch another object or the border. The index of the clip sets the direction
of the first mover and the scene is drawn to fit it, so all four directions are equally frequent.
"""

from typing import NamedTuple

import numpy as np

from mplug_jax.scenes import rendering
from mplug_jax.scenes import scene as scenes
from mplug_jax.scenes.questions import Question
from mplug_jax.scenes.text import (
  OPPOSITE,
  PHRASES,
  Words,
  describe,
  matching,
  pick,
  related,
  with_article,
)

STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_TOWARDS = {
  "left": ("to the left", "leftwards"),
  "right": ("to the right", "rightwards"),
  "up": ("up", "upwards"),
  "down": ("down", "downwards"),
}
# a: a mover, d: its direction, v: a verb, b: an object that stays.
_TEMPLATES = (
  "{a} {v} {d}",
  "the clip shows {a} that {v} {d}",
  "we see how {a} {v} {d}",
  "in this clip {a} {v} {d}",
  "{a} {v} {d} while {b} stays in place",
  "{a} {v} {d} and {b} does not move",
  "{b} stays in place and {a} {v} {d}",
  "there is {a} that {v} {d}, and {b} at rest",
)
_VERBS = ("moves", "travels", "slides", "drifts")


class ClipCaption(NamedTuple):
  """One caption of a clip.

  Attributes:
    text: the caption.
    form: ((Desc, direction or "still"), ...), true for some distinct objects of the clip.
    unseen: True if the text names a held-out (shape, color) pair.
  """

  text: str
  form: tuple
  unseen: bool


class Clip(NamedTuple):
  """Scenes of one clip with its texts.

  Attributes:
    frames: scenes that differ only in the boxes of the moving objects.
    moves: {index of a moving object: its direction}.
    captions: 5 captions.
    questions: 5 questions, one per family.
  """

  frames: tuple[scenes.Scene, ...]
  moves: dict[int, str]
  captions: list[ClipCaption]
  questions: list[Question]


def _reach(scene, mover, direction, blocked):
  """Returns how many pixels the mover can travel and stay 2 px off borders and blocked boxes."""
  dx, dy = STEPS[direction]
  x1, y1, x2, y2 = scene.objects[mover].box
  reach = {"left": x1, "up": y1, "right": scene.config.size - x2, "down": scene.config.size - y2}[
    direction
  ] - 1
  for bx1, by1, bx2, by2 in blocked:
    beside = by1 - 2 < y2 and y1 < by2 + 2 if dx else bx1 - 2 < x2 and x1 < bx2 + 2
    gap = {"left": x1 - bx2, "right": bx1 - x2, "up": y1 - by2, "down": by1 - y2}[direction] - 2
    behind = {"left": bx1 >= x2, "right": bx2 <= x1, "up": by1 >= y2, "down": by2 <= y1}[direction]
    if beside and not behind:
      reach = min(reach, gap)
  return reach


def _travel(rng, scene, direction, taken):
  """Returns (index, final box) of an object with room to move, or None.

  Args:
    rng: generator of the clip.
    scene: first frame.
    direction: key of STEPS.
    taken: {index of an object that already moves: box around its path}.
  """
  shortest = round(0.3 * scene.config.size)
  for mover in rng.permutation(len(scene.objects)).tolist():
    blocked = [taken.get(i, o.box) for i, o in enumerate(scene.objects) if i != mover]
    reach = _reach(scene, mover, direction, blocked)
    if mover not in taken and reach >= shortest:
      distance = int(rng.integers(shortest, reach + 1))
      dx, dy = (step * distance for step in STEPS[direction])
      x1, y1, x2, y2 = scene.objects[mover].box
      return mover, (x1 + dx, y1 + dy, x2 + dx, y2 + dy)
  return None


def _union(a, b):
  return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _motions(rng, scene, direction, movers):
  """Returns {index: (direction, final box)} of 1 or 2 movers in different directions, or None."""
  motions = {}
  others = [d for d in STEPS if d != direction]
  for way in (direction, pick(rng, others))[: min(movers, len(scene.objects) - 1)]:
    swept = {i: _union(scene.objects[i].box, end) for i, (_, end) in motions.items()}
    travel = _travel(rng, scene, way, swept)
    if travel is None:
      return None
    mover, end = travel
    motions[mover] = (way, end)
  return motions


def _frame(scene, motions, fraction):
  """Returns the scene after a fraction of all motions."""
  objects = list(scene.objects)
  for i, (_, end) in motions.items():
    box = tuple(a + round((b - a) * fraction) for a, b in zip(objects[i].box, end, strict=True))
    objects[i] = objects[i]._replace(box=box)
  return scene._replace(objects=tuple(objects))


def _draw_caption(rng, scene, motions):
  mover = pick(rng, sorted(motions))
  still = pick(rng, [i for i in range(len(scene.objects)) if i not in motions])
  names = pick(rng, (("color", "shape"), ("size", "color", "shape"), ("size", "shape")))
  a, b = (describe(scene.objects[i], names) for i in (mover, still))
  template = pick(rng, _TEMPLATES)
  direction = motions[mover][0]
  words = Words(rng)
  text = template.format(
    a=with_article(words.say(a)),
    b=with_article(words.say(b)),
    d=pick(rng, _TOWARDS[direction]),
    v=pick(rng, _VERBS),
  )
  if "{b}" not in template:
    return ClipCaption(text, ((a, direction),), a.held_out)
  return (
    None if a == b else ClipCaption(text, ((a, direction), (b, "still")), a.held_out or b.held_out)
  )


def _captions(rng, scene, motions, count=5):
  captions = {}
  while len(captions) < count:
    caption = _draw_caption(rng, scene, motions)
    if caption is not None:
      captions.setdefault(caption.text, caption)
  return list(captions.values())


def _singled_out(scene, target):
  """Returns a description that fits the target alone."""
  descs = [describe(target, names) for names in (("color", "shape"), ("size", "color", "shape"))]
  return next(d for d in descs if len(matching(scene, d)) == 1)


def _questions(rng, first, last, motions):
  """Returns one question each: direction, mover_color, mover_shape, moves, finally."""
  words = Words()
  mover = next(iter(motions))
  moving = first.objects[mover]
  direction = motions[mover][0]
  still = pick(rng, [i for i in range(len(first.objects)) if i not in motions])
  desc = _singled_out(first, moving)
  questions = [
    Question(
      f"in which direction does the {words.say(desc)} move?",
      direction,
      "direction",
      ("direction", desc),
      moving.held_out,
    )
  ]
  for name, family in (("color", "mover_color"), ("shape", "mover_shape")):
    text = f"what {name} is the object that moves {_TOWARDS[direction][0]}?"
    questions.append(
      Question(text, getattr(moving, name), family, ("mover", name, direction), moving.held_out)
    )
  positive = bool(rng.integers(2))
  asked = moving if positive else first.objects[still]
  desc = _singled_out(first, asked)
  questions.append(
    Question(
      f"does the {words.say(desc)} move?",
      "yes" if positive else "no",
      "moves",
      ("moves", desc),
      asked.held_out,
    )
  )
  positive = bool(rng.integers(2))
  a = last.objects[mover]
  b = last.objects[still]
  relation = pick(rng, related(last, a, b))
  relation = relation if positive else OPPOSITE[relation]
  nouns = [_singled_out(first, o) for o in (a, b)]
  text = (
    f"is the {words.say(nouns[0])} {PHRASES[relation][0]} the {words.say(nouns[1])} at the end?"
  )
  questions.append(
    Question(
      text,
      "yes" if positive else "no",
      "finally",
      ("finally", relation, *nouns),
      a.held_out or b.held_out,
    )
  )
  return questions


def clip(config: scenes.SceneConfig, split: str, index: int, frames: int = 8) -> Clip:
  """Returns a clip with 5 captions and 5 questions, one per family.

  Args:
    config: of the scenes.
    split: "train", "val" or "test".
    index: 0 <= index < split_size(split).
    frames: number of frames, at least 2.

  Raises:
    ValueError: frames < 2.
    IndexError: index is out of range.
  """
  if frames < 2:
    raise ValueError(f"A clip needs at least 2 frames to show motion, got {frames}.")
  rng = scenes.generator(config, split, index, "clip")
  direction = list(STEPS)[index % 4]
  movers = int(rng.integers(1, 3))
  motions = None
  while motions is None:
    scene = scenes.scene(config, split, int(rng.integers(scenes.split_size(split))))
    motions = _motions(rng, scene, direction, movers)
  steps = tuple(_frame(scene, motions, t / (frames - 1)) for t in range(frames))
  return Clip(
    steps,
    {i: way for i, (way, _) in motions.items()},
    _captions(rng, scene, motions),
    _questions(rng, steps[0], steps[-1], motions),
  )


def render_clip(clip: Clip, config: scenes.SceneConfig) -> np.ndarray:
  """Returns the pixels u8[T, size, size, 3] of a clip; its background does not change."""
  return np.stack([rendering.render(frame, config) for frame in clip.frames])
