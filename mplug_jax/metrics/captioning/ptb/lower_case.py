"""Lower case as in Java.

It differs from Python's in the capital sigma: the word it is in decides whether it becomes a final
sigma.
"""

import re
import unicodedata

# Characters that count as cased, in addition to letters with a case: modifiers, the Greek iota
# subscript, Roman numerals.
_CASED = re.compile(
  "[\u02b0-\u02b8\u02c0\u02c1\u02e0-\u02e4\u0345\u037a\u1d2c-\u1d61\u2160-\u217f]"
)
# Han and kana, which do not form words with Greek.
_APART = re.compile("[\u3005\u3041-\u30fe\u4e00-\u9fff\uf900-\ufa2d]")
_SIGMA_TOKEN = re.compile("[^ \n]*\u03a3[^ \n]*")


def lower(text: str) -> str:
  """Converts tokens to lower case.

  Args:
    text: tokens, separated by spaces and line feeds.
  """
  if "\u03a3" in text:
    text = _SIGMA_TOKEN.sub(lambda match: _without_capital_sigma(match[0]), text)
  return text.lower()


def _without_capital_sigma(token):
  return "".join(
    ("\u03c2" if _is_final(token, i) else "\u03c3") if char == "\u03a3" else char
    for i, char in enumerate(token)
  )


def _is_final(token, at):
  """Returns whether a sigma has a cased letter before it in its word and none after it."""
  return _cased_follows(token[at::-1]) and not _cased_follows(token[at:])


def _cased_follows(rest):
  """Returns whether a cased letter comes after the first character and before its word ends.

  A single hyphen, apostrophe or full stop between letters does not end a word, nor a full stop or
  comma between digits.
  """
  for i, char in enumerate(rest[1:], start=1):
    if _joins(char):
      if _CASED.match(char) or unicodedata.category(char) in ("Lu", "Ll", "Lt"):
        return True
    elif not (i + 1 < len(rest) and _connects(char, rest[i - 1], rest[i + 1])):
      return False
  return False


def _connects(char, left, right):
  """Returns whether a character between two others does not end their word."""
  if not _joins(left) or not _joins(right):
    return False
  digits = [unicodedata.category(side)[0] == "N" for side in (left, right)]
  if all(digits):
    return char in ".,'"
  return not any(digits) and (
    char in "'\".\u00ad\u2027" or unicodedata.category(char) in ("Pd", "Pc")
  )


def _joins(char):
  """Returns whether a character is part of a word."""
  category = unicodedata.category(char)
  return (category[0] in "LMN" or category == "Cf" and char != "\u00ad") and not _APART.match(char)
