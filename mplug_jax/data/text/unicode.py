r"""The one decoding of all text files, and texts that are no valid Unicode.

Text is UTF-8, with or without a byte order mark, which is no part of the text. Other encodings are
refused: they cannot be told apart with certainty.

A lone surrogate is half of a character beyond U+FFFF. JSON can write one as "\ud83d", for instance
where a program cut an emoji in two; UTF-8 and the tokenizers cannot represent it.
"""

import codecs
import io
import re
from typing import BinaryIO

REPLACEMENT = "\ufffd"

_MARK = "\ufeff"
_SURROGATE = re.compile("[\ud800-\udfff]")
# UTF-32 in little-endian order begins as UTF-16 does.
_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


def decode(data: bytes, name: object) -> str:
  """Decodes the bytes of a text.

  Args:
    data: UTF-8, with or without a byte order mark.
    name: the file, or the text in it, for messages.

  Returns:
    The text without the mark.

  Raises:
    ValueError: it is not UTF-8.
  """
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    # The decoder counts from behind the mark.
    start = error.start + len(codecs.BOM_UTF8) * data.startswith(codecs.BOM_UTF8)
    raise ValueError(f"{name} {not_utf8(data, start)}.") from None


def not_utf8(beginning: bytes, byte: int | None = None) -> str:
  """Says why a text cannot be decoded; continues a sentence that begins with its name.

  Args:
    beginning: its first four bytes, or more.
    byte: position of the first wrong byte, if it is known.
  """
  if beginning.startswith(_WIDE_MARKS):
    return "is UTF-16 or UTF-32 text; save it as UTF-8"
  return "is not UTF-8 text" if byte is None else f"is not UTF-8 text (byte {byte})"


def text_file(file: BinaryIO, newline: str = "") -> io.TextIOWrapper:
  """Opens the text of an open file; reading it raises UnicodeDecodeError as `decode` would.

  Args:
    file: the file at its beginning.
    newline: as in `open`; line ends stay as they are.
  """
  return io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)


def without_mark(text: str) -> str:
  """Returns a decoded text without a byte order mark at its beginning.

  Args:
    text: decoded by someone who keeps the mark.
  """
  return text.removeprefix(_MARK)


def invalid_unicode(text: str) -> bool:
  """Returns whether a text is no valid Unicode, because it has a lone surrogate.

  Args:
    text: any text.
  """
  return not text.isascii() and _SURROGATE.search(text) is not None


def problem(text: str) -> str:
  r"""Says what makes a text invalid, as "no valid Unicode (the lone surrogate \ud83d)".

  Args:
    text: one of which `invalid_unicode` is true.
  """
  match = _SURROGATE.search(text)
  assert match
  return f"no valid Unicode (the lone surrogate \\u{ord(match[0]):04x})"


def printable(text: str) -> str:
  r"""Returns a text that any UTF-8 output takes: a lone surrogate becomes "\ud83d".

  Args:
    text: any text, such as the name of a file that is not UTF-8.
  """
  return text.encode("utf-8", "backslashreplace").decode("utf-8")


def repaired(text: str) -> str:
  """Returns a text with U+FFFD in place of each lone surrogate.

  Args:
    text: any text.
  """
  return _SURROGATE.sub(REPLACEMENT, text)
