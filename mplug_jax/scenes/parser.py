"""Parser of captions of procedural scenes: text -> logical form.

With the form, the oracle decides whether a generated caption is true.
"""

import functools
import re

from mplug_jax.scenes import scene
from mplug_jax.scenes import text as scene_text

# Objects of the relations r and s, per kind of template.
_RELATED = {
  "pair": ("ab",),
  "size": ("ab",),
  "fork": ("ab", "ac"),
  "chain": ("ab", "bc"),
  "both": ("ac", "bc"),
}
_SLOT = re.compile(r"\{(\w)\}")


def _meanings(words):
  """Returns {word or synonym: plain word}."""
  return {synonym: word for word in words for synonym in scene_text.SYNONYMS.get(word, (word,))}


_SIZES, _COLORS, _SHAPES = map(_meanings, (scene.SIZES, scene.COLORS, (*scene.SHAPES, "object")))
_RELATIONS = {phrase: name for name, phrases in scene_text.PHRASES.items() for phrase in phrases}


def _any(words):
  return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


@functools.cache
def _patterns():
  """Returns [(kind, pattern)] of all templates, with a named group per slot."""
  noun_phrase = rf"an? (?:(?:{_any(_SIZES)}) )?(?:(?:{_any(_COLORS)}) )?(?:{_any(_SHAPES)})"
  slots = (
    dict.fromkeys("abc", noun_phrase)
    | dict.fromkeys("rsR", _any(_RELATIONS))
    | {"x": "larger|bigger|smaller"}
  )
  patterns = []
  for kind, templates in scene_text.TEMPLATES.items():
    for template in templates:
      parts = _SLOT.split(template)  # text and slots alternate
      patterns.append(
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
  return patterns


def _thing(phrase):
  """Returns the Desc of a phrase such as "a tiny red disc"."""
  words = (
    phrase.split()[1:] if not phrase.endswith("plus sign") else [*phrase.split()[1:-2], "plus sign"]
  )
  meanings = (("size", _SIZES), ("color", _COLORS), ("shape", _SHAPES))
  attributes = {name: known[word] for word in words for name, known in meanings if word in known}
  return scene_text.Desc(**{name: word for name, word in attributes.items() if word != "object"})


def _statement(kind, slots):
  """Returns the Statement of a matched template, None if its relation does not suit the kind."""
  objects = tuple(_thing(slots[name]) for name in "abc" if name in slots)
  if kind in ("color", "shape"):
    return scene_text.Statement(objects, ((f"same_{kind}", 0, 1),))
  if "x" in slots:
    names = ["larger" if slots["x"] == "bigger" else slots["x"]]
  else:
    names = [
      _RELATIONS[slots["r"]] if "r" in slots else scene_text.OPPOSITE[_RELATIONS[slots["R"]]]
    ]
  if (names[0] in scene_text.DIRECTIONS) == (kind == "size"):
    return None
  names += [_RELATIONS[slots["s"]] if "s" in slots else names[0]] * (len(_RELATED[kind]) - 1)
  relations = tuple(
    (name, "abc".index(a), "abc".index(b)) for name, (a, b) in zip(names, _RELATED[kind])
  )
  return scene_text.Statement(objects, relations)


def parse(text: str) -> scene_text.Statement | None:
  """Returns the Statement of a caption, None if no template of scenes.text matches it."""
  for kind, pattern in _patterns():
    match = pattern.fullmatch(text)
    form = match and _statement(kind, match.groupdict())
    if form:
      return form
  return None
