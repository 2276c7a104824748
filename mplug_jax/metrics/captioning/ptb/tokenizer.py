"""Tokenizes captions as the COCO caption evaluation does.

The result is Penn Treebank tokens in lower case without punctuation, equal, token by token, to
pycocoevalcap.tokenizer.PTBTokenizer, which runs Stanford CoreNLP 3.4.1 in Java. Its peculiarities
are kept: brackets are spelled -lrb-, -rrb-, ... and stay, because the list of punctuation has them
in upper case; a token may contain no-break spaces ("1 1/2", "(555) 555-1234"); the next caption
decides whether "A." is one token or two. Capitals added to Unicode after 2021 are lowered by
Python's tables, which may differ from those of a Java version.
"""

import functools
import re
from collections.abc import Iterable, Iterator

from mplug_jax.metrics.captioning.ptb import grammar, lower_case, scanner

# Tokens that are dropped from the text in lower case.
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
_MAX_PIECE = 40  # characters of a cached piece
_MAX_PIECES = 1 << 16  # cached pieces


def tokenize(captions: Iterable[str]) -> list[str]:
  """Returns the tokens of captions, joined by spaces; "" for a caption without tokens.

  The captions are read as the lines of one text, as the reference does: the beginning of the next
  caption can decide how an abbreviation at the end is read. A line feed in a caption counts as a
  space. The reference confuses captions with other line breaks inside, such as carriage returns,
  and with markup that is open at the end; here a token belongs to the caption in which it begins.

  Args:
    captions: the captions.

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
  """Splits a text into tokens, and caches pieces that do not depend on the following text."""

  def __init__(self):
    self._match = scanner.Scanner(
      [scanner.Rule(rule.pattern, rule.before) for rule in grammar.RULES], grammar.NAMES
    ).match
    self._known = {}

  def read(self, text: str) -> Iterator[str]:
    """Yields parts of the result: each token with a space, and the line feeds of the text."""
    at = 0
    known = self._known
    while at < len(text):
      match = _PIECE.match(text, at)
      if match is None:
        at, _, tokens = self._read_piece(text, at, len(text))
        yield tokens
        continue
      piece = match[0]
      tokens = known.get(piece)
      if tokens is not None:
        at = match.end()
      else:
        at, seen, tokens = self._read_piece(text, at, match.end() - 1)
        if seen <= match.end() and len(piece) <= _MAX_PIECE and len(known) < _MAX_PIECES:
          known[piece] = tokens
      yield tokens

  def _read_piece(self, text, at, end):
    """Reads tokens until `end`, and the space or line feed there.

    Returns (end, end of the part that was read, tokens).
    """
    tokens = []
    farthest = at
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
    if at == end < len(text):  # no token begins with a space or a line feed
      if text[at] == "\n":
        tokens.append("\n")
      at += 1
    return at, farthest, "".join(tokens)


@functools.cache
def _lexer():
  return _Lexer()


def _shown(form, token):
  """Returns a token with the space after it. `form`: the rule's `token`."""
  if form is not None:
    token = form if isinstance(form, str) else form(token)
  if not token:
    return ""
  if token == grammar.NEWLINE:  # a line break inside a caption
    return ""
  if not token.isascii():
    token = token.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
  return token.replace("\n", "\u00a0") + " " + "\n" * token.count("\n")
