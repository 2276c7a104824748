"""JSON text to values, of which nothing is merged or invalid without a word.

The standard parser keeps the last value of a repeated key, and accepts lone surrogates (see
text/unicode.py). Both are counted here, and named with their location.
"""

import contextlib
import json
import os
import re
from typing import Any

from mplug_jax.data.errors import BadRecords, RecordError, note
from mplug_jax.data.text import unicode

# Escapes of surrogates. A lone one in decoded text can only come from such an escape.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_PAIR = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
# Keys whose texts name files. Python gives names that are not UTF-8 as surrogates, which open them.
_FILE_KEYS = ("image", "images", "file_name", "filename", "filepath", "video_id")


def _may_be_invalid(text: str, start: int, end: int) -> bool:
  """Returns whether a part of JSON text may have a lone surrogate."""
  if _HALF.search(text, start, end) is None:
    return False
  part = text[start:end]
  # After an escaped backslash, what looks like a pair may be none.
  return r"\\u" in part or _HALF.search(_PAIR.sub(" ", part)) is not None


class _Repeating(dict):
  """An object with repeated keys; it has their last values."""

  def __init__(self, pairs: list[tuple[str, Any]]):
    super().__init__(pairs)
    keys = [key for key, _ in pairs]
    self.repeated = [key for key in self if keys.count(key) > 1]


def repeated_keys(value: Any) -> tuple[str, ...]:
  """Returns the keys that an object repeats, if it is one.

  Args:
    value: a JSON value as `Parser` makes it.
  """
  return tuple(value.repeated) if isinstance(value, _Repeating) else ()


class Checks:
  """Counts repeated keys and lone surrogates of JSON values, and repairs the latter.

  Attributes:
    repeated: count of objects with repeated keys.
    invalid: count of records with a text that is no valid Unicode.
  """

  def __init__(self, strict: bool = False, repair: bool = True):
    """Begins the counts.

    Args:
      strict: config.data.strict; the first such record is an error.
      repair: put U+FFFD in place of lone surrogates; otherwise they stay and are not counted.
    """
    self.repeated = BadRecords(strict, "Its last value counts.")
    self.invalid = BadRecords(strict, "U+FFFD takes its place.")
    self._repair = repair

  def value(self, value: Any, location: str) -> Any:
    """Checks a value.

    Args:
      value: a JSON value as `Parser` makes it.
      location: its location, for messages.

    Returns:
      The value, repaired.

    Raises:
      RecordError: a key is repeated or a text invalid, if strict.
    """
    repeated: list[str] = []
    invalid: dict[str, str] = {}
    value = self._walk(value, "", repeated, invalid)
    for key in repeated:
      self.repeated.add(RecordError(f"{location}: the key {key!r} is repeated."))
    for key, problem in invalid.items():
      self.invalid.add(RecordError(f"{location}: {key or 'the text'} is {problem}."))
    return value

  def _walk(self, value: Any, key: str, repeated: list[str], invalid: dict[str, str]) -> Any:
    """Returns a repaired value; `key` is the outermost one that it belongs to."""
    if isinstance(value, str):
      if not self._repair or not unicode.invalid_unicode(value):
        return value
      if key in _FILE_KEYS and _is_file_name(value):
        return value
      invalid.setdefault(key, unicode.problem(value))
      return unicode.repaired(value)
    if isinstance(value, list):
      return [self._walk(item, key, repeated, invalid) for item in value]
    if isinstance(value, dict):
      repeated += repeated_keys(value)
      return {
        self._walk(name, key, repeated, invalid): self._walk(item, key or name, repeated, invalid)
        for name, item in value.items()
      }
    return value

  def file(self, value: Any, path: object) -> Any:
    """Checks the value of a whole file, as `value` does; locations count entries from 1.

    Args:
      value: its value; lists in an object have entries too.
      path: the file.

    Returns:
      The value, repaired.

    Raises:
      RecordError: as in `value`.
    """
    if isinstance(value, list):
      return [self.value(item, f"{path}, entry {n}") for n, item in enumerate(value, 1)]
    if not isinstance(value, dict):
      return self.value(value, str(path))
    for key in repeated_keys(value):
      self.repeated.add(RecordError(f"{path}: the key {key!r} is repeated."))
    return {
      self.value(key, str(path)): self.file(item, f"{path}, {key}")
      if isinstance(item, list)
      else self.value(item, f"{path}, {key}")
      for key, item in value.items()
    }

  def report(self, files: str) -> None:
    """Tells how many records were counted, if there are more than those that were named.

    Args:
      files: the files that were read, for the message.
    """
    for bad, problem in ((self.repeated, "repeated keys"), (self.invalid, "invalid Unicode")):
      if bad.count > len(bad.sentences):
        note(f"{files}: {bad.count} entries have {problem}.")


def _is_file_name(text: str) -> bool:
  """Returns whether a text with surrogates is the name of a file that is not UTF-8."""
  with contextlib.suppress(UnicodeEncodeError):
    return bool(os.fsencode(text))
  return False


class Parser:
  """Parses JSON text, and remembers whether its value needs `Checks`.

  Attributes:
    suspicious: whether the last value has repeated keys or may have lone surrogates.
  """

  def __init__(self):
    self.suspicious = False
    self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

  def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) == len(pairs):
      return value
    self.suspicious = True
    return _Repeating(pairs)

  def raw_decode(self, text: str, start: int = 0) -> tuple[Any, int]:
    """Parses the value that begins at a position.

    Args:
      text: the text.
      start: position of the value.

    Returns:
      (the value, the position of its end).

    Raises:
      json.JSONDecodeError: there is no complete value.
      RecursionError: lists or objects are nested too deeply.
    """
    self.suspicious = False
    value, end = self._decoder.raw_decode(text, start)
    self.suspicious = self.suspicious or _may_be_invalid(text, start, end)
    return value, end

  def decode(self, text: str) -> Any:
    """Parses a text that holds one value; raises as `raw_decode`."""
    self.suspicious = False
    value = self._decoder.decode(text)
    self.suspicious = self.suspicious or _may_be_invalid(text, 0, len(text))
    return value
