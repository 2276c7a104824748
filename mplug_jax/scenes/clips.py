"""Short clips: one or two objects of a scene move in a straight line, the others stay.

Moving objects never touch another object or the border. The direction of the first mover comes from
the clip's number, the scene to fit it, so that all four are equally frequent.
"""

from typing import NamedTuple

import numpy as np

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
  """`form`: ((Desc, direction or "still"), ...), true for some distinct objects of the clip."""

  text: str
  form: tuple
  unseen: bool


class Clip(NamedTuple):
  """`frames` differ in the movers' boxes alone; `moves`: {object number: direction}."""

  frames: tuple[scenes.Scene, ...]
  moves: dict[int, str]
  captions: list[ClipCaption]
  questions: list[Question]


def _reach(scene, mover, direction, blocked):
  """Whole pixels the mover can go before the border or a blocked box, 2 px apart."""
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
  """(object, box at the end) of an object with room to move, None if there is none; `taken`:
  {object: area it sweeps}."""
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
  """{object: (direction, box at the end)} of 1 or 2 movers in different directions, or None."""
  motions = {}
  others = [d for d in STEPS if d != direction]
  for way in (direction, pick(rng, others))[: min(movers, len(scene.objects) - 1)]:
    swept = {i: _union(scene.objects[i].box, end) for i, (_, end) in motions.items()}
    found = _travel(rng, scene, way, swept)
    if found is None:
      return None
    motions[found[0]] = (way, found[1])
  return motions


def _frame(scene, motions, fraction):
  objects = list(scene.objects)
  for i, (_, end) in motions.items():
    box = tuple(a + round((b - a) * fraction) for a, b in zip(objects[i].box, end, strict=True))
    objects[i] = objects[i]._replace(box=box)
  return scene._replace(objects=tuple(objects))


def _draw_caption(rng, scene, motions):
  mover = pick(rng, sorted(motions))
  still = pick(rng, [i for i in range(len(scene.objects)) if i not in motions])
  names = pick(rng, (("colour", "shape"), ("size", "colour", "shape"), ("size", "shape")))
  a, b = (describe(scene.objects[i], names) for i in (mover, still))
  template, direction, words = pick(rng, _TEMPLATES), motions[mover][0], Words(rng)
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
  found = {}
  while len(found) < count:
    caption = _draw_caption(rng, scene, motions)
    if caption is not None:
      found.setdefault(caption.text, caption)
  return list(found.values())


def _singled_out(scene, thing):
  descs = [describe(thing, names) for names in (("colour", "shape"), ("size", "colour", "shape"))]
  return next(d for d in descs if len(matching(scene, d)) == 1)


def _questions(rng, first, last, motions):
  """One question of each of the families direction, mover_colour, mover_shape, moves, finally."""
  words = Words()
  mover = next(iter(motions))
  thing, direction = first.objects[mover], motions[mover][0]
  still = pick(rng, [i for i in range(len(first.objects)) if i not in motions])
  desc = _singled_out(first, thing)
  found = [
    Question(
      f"in which direction does the {words.say(desc)} move?",
      direction,
      "direction",
      ("direction", desc),
      thing.held_out,
    )
  ]
  for name, word in (("colour", "color"), ("shape", "shape")):
    text = f"what {word} is the object that moves {_TOWARDS[direction][0]}?"
    found.append(
      Question(
        text, getattr(thing, name), f"mover_{name}", ("mover", name, direction), thing.held_out
      )
    )
  wanted = bool(rng.integers(2))
  asked = thing if wanted else first.objects[still]
  desc = _singled_out(first, asked)
  found.append(
    Question(
      f"does the {words.say(desc)} move?",
      "yes" if wanted else "no",
      "moves",
      ("moves", desc),
      asked.held_out,
    )
  )
  wanted = bool(rng.integers(2))
  a, b = last.objects[mover], last.objects[still]
  relation = pick(rng, related(last, a, b))
  relation = relation if wanted else OPPOSITE[relation]
  nouns = [_singled_out(first, o) for o in (a, b)]
  text = (
    f"is the {words.say(nouns[0])} {PHRASES[relation][0]} the {words.say(nouns[1])} at the end?"
  )
  found.append(
    Question(
      text,
      "yes" if wanted else "no",
      "finally",
      ("finally", relation, *nouns),
      a.held_out or b.held_out,
    )
  )
  return found


def clip(config: scenes.SceneConfig, split: str, index: int, frames: int = 8) -> Clip:
  """Clip `index` of a split: 5 captions, 5 questions (one a family), `frames` descriptions.

  Raises ValueError when frames < 2, IndexError outside 0 <= index < split_size(split).
  """
  if frames < 2:
    raise ValueError(f"a clip of {frames} frame(s) shows no motion: ask for 2 or more")
  rng = scenes.generator(config, split, index, "clip")
  direction, movers = list(STEPS)[index % 4], int(rng.integers(1, 3))
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
  """Pixels u8[T, size, size, 3] of a clip; the background does not change."""
  return np.stack([scenes.render(frame, config) for frame in clip.frames])
