"""Captions -> tokens as the COCO caption evaluation makes them: Penn Treebank tokens in lower case, punctuation left out.

Equal, token by token, to pycocoevalcap.tokenizer.PTBTokenizer, which runs Stanford CoreNLP 3.4.1 in
Java. Its habits are kept: brackets are spelled -lrb-, -rrb-, ... and stay, because the list of
punctuation has them in upper case; a token may have no-break spaces inside ("1 1/2", "(555)
555-1234"); whether "A." is one token or two depends on the caption that follows. Capitals that
Unicode got after 2021 have the small letters that Python's tables know, not those of a certain
Java.
"""

import functools
import re
from collections.abc import Iterable, Iterator

from mplug_jax.metrics.captioning.ptb import grammar, lower_case, scanner

# What is left out, after the text is in lower case.
PUNCTUATION = frozenset(
  (
    "''",
    "'",
    "``",
    "`",
    "-LRB-",
    "-RRB-",
    "-LCB-",
    "-RCB-",
    ".",
    "?",
    "!",
    ",",
    ":",
    "-",
    "--",
    "...",
    ";",
  )
)

_PIECE = re.compile(r"[^ \n]*[ \n]")
_MAX_PIECE, _MAX_PIECES = 40, 1 << 16  # of what is remembered


def tokenize(captions: Iterable[str]) -> list[str]:
  """The tokens of captions, each caption's joined by spaces; "" where nothing is left.

  The captions are read as one text of a line each, as the reference reads them: the beginning of
    the next one can decide how an
  abbreviation at the end is taken. A line feed in a caption counts as a space. Where the reference
  would lose track of which line is which caption (other line breaks inside captions, such as
  carriage returns, and markup that is open at a caption's end), a token belongs to the caption that
  it begins in.

  Raises:
    TypeError: a caption is not a string.
  """
  lines = []
  for number, caption in enumerate(captions):
    if not isinstance(caption, str):
      raise TypeError(f"caption {number} is {caption!r}, not a string.")
    lines.append(caption.replace("\n", " "))
  if not lines:
    return []
  text = "\n".join(lines)
  if max(text, default="") > "\uffff":  # code units of UTF-16, as Java's char
    text = "".join(map(chr, memoryview(text.encode("utf-16-le", "surrogatepass")).cast("H")))
  tokenized = lower_case.lower("".join(_lexer().read(text))).split("\n")
  return [
    " ".join([w for w in line.rstrip().split(" ") if w and w not in PUNCTUATION])
    for line in tokenized
  ]


class _Lexer:
  """Text -> tokens, remembering the pieces between spaces whose tokens do not depend on what follows."""

  def __init__(self):
    self._match = scanner.Scanner(
      [scanner.Rule(rule.pattern, rule.before) for rule in grammar.RULES], grammar.NAMES
    ).match
    self._known = {}

  def read(self, text: str) -> Iterator[str]:
    """Yields, in pieces that concatenate to it: each token and a space, and the line feeds of the text where they were."""
    at, end, known = 0, len(text), self._known
    while at < end:
      found = _PIECE.match(text, at)
      piece = found[0] if found else text[at:]
      tokens = known.get(piece) if found else None
      if tokens is None:
        stop, seen, tokens = self._read_piece(text, at, at + len(piece) - bool(found))
        if found and seen <= found.end() and len(piece) <= _MAX_PIECE and len(known) < _MAX_PIECES:
          known[piece] = tokens
        at = stop
      else:
        at = found.end()
      yield tokens

  def _read_piece(self, text, at, end):
    """Reads tokens until `end`, and the space or line feed there.

    Returns (where it ended, how far it looked, tokens).
    """
    tokens, farthest = [], at
    while at < end:
      number, stop, seen = self._match(text, at)
      farthest = max(farthest, seen)
      if number < 0:  # no part of any token
        at += 1
        continue
      rule = grammar.RULES[number]
      token = text[at:stop]
      stop -= rule.give_back
      if rule.give_back and not rule.keep_text:
        token = text[at:stop]
      at = stop
      tokens.append(_shown(rule.token, token))
    if at == end < len(text):  # no token begins with a space or goes over from a line feed
      tokens.append("\n" * (text[at] == "\n"))
      at += 1
    return at, farthest, "".join(tokens)


@functools.cache
def _lexer():
  return _Lexer()


def _shown(form, token):
  """A token as it is written, with the space after it. `form`: the rule's `token`."""
  if form is not None:
    token = form if isinstance(form, str) else form(token)
  if not token:
    return ""
  if token == grammar.NEWLINE:  # any line break but the one between captions
    return ""
  if not token.isascii():
    token = token.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
  return token.replace("\n", "\u00a0") + " " + "\n" * token.count("\n")
