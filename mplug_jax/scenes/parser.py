"""Reads captions of procedural scenes back: text -> logical form, so that a generated caption can be judged true or false."""

import functools
import re

from mplug_jax.scenes import scene
from mplug_jax.scenes import text as scene_text

_PLACES = {
  "pair": ("ab",),
  "size": ("ab",),
  "fork": ("ab", "ac"),
  "chain": ("ab", "bc"),
  "both": ("ac", "bc"),
}  # of relations r, s
_SLOT = re.compile(r"\{(\w)\}")


def _meanings(words):
  """{word or synonym: the plain word}."""
  return {synonym: word for word in words for synonym in scene_text.SYNONYMS.get(word, (word,))}


_SIZES, _COLOURS, _SHAPES = map(_meanings, (scene.SIZES, scene.COLOURS, (*scene.SHAPES, "object")))
_RELATIONS = {phrase: name for name, phrases in scene_text.PHRASES.items() for phrase in phrases}


def _any(words):
  return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


@functools.cache
def _patterns():
  """[(kind, pattern)] of every template, with a named group for each of its slots."""
  thing = rf"an? (?:(?:{_any(_SIZES)}) )?(?:(?:{_any(_COLOURS)}) )?(?:{_any(_SHAPES)})"
  slots = (
    dict.fromkeys("abc", thing)
    | dict.fromkeys("rsR", _any(_RELATIONS))
    | {"x": "larger|bigger|smaller"}
  )
  found = []
  for kind, templates in scene_text.TEMPLATES.items():
    for template in templates:
      parts = _SLOT.split(template)  # text and slots by turns
      found.append(
        (
          kind,
          re.compile(
            "".join(
              f"(?P<{part}>{slots[part]})" if i % 2 else re.escape(part)
              for i, part in enumerate(parts)
            )
          ),
        )
      )
  return found


def _thing(phrase):
  """ "a tiny red disc" -> Desc."""
  words = (
    phrase.split()[1:] if not phrase.endswith("plus sign") else [*phrase.split()[1:-2], "plus sign"]
  )
  meanings = (("size", _SIZES), ("colour", _COLOURS), ("shape", _SHAPES))
  said = {name: known[word] for word in words for name, known in meanings if word in known}
  return scene_text.Desc(**{name: word for name, word in said.items() if word != "object"})


def _statement(kind, slots):
  """Kind and slots of a matched template -> Statement, or None where the relation is of another kind."""
  things = tuple(_thing(slots[name]) for name in "abc" if name in slots)
  if kind in ("colour", "shape"):
    return scene_text.Statement(things, ((f"same_{kind}", 0, 1),))
  if "x" in slots:
    names = [{"bigger": "larger"}.get(slots["x"], slots["x"])]
  else:
    names = [
      _RELATIONS[slots["r"]] if "r" in slots else scene_text.OPPOSITE[_RELATIONS[slots["R"]]]
    ]
  if (names[0] in scene_text.DIRECTIONS) == (kind == "size"):
    return None
  names += [_RELATIONS[slots["s"]] if "s" in slots else names[0]] * (len(_PLACES[kind]) - 1)
  relations = tuple(
    (name, *("abc".index(place) for place in places)) for name, places in zip(names, _PLACES[kind])
  )
  return scene_text.Statement(things, relations)


def parse(text):
  """A caption as scene_text.py words them -> its `Statement`; None when it is of no such form."""
  for kind, pattern in _patterns():
    if match := pattern.fullmatch(text):
      if form := _statement(kind, match.groupdict()):
        return form
  return None
