"""Large json files entry by entry, so that a file of a gigabyte never is in memory as Python objects."""

import io
import json
import re

from mplug_jax.data.storage import annotations, tabular

_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
_KINDS = {int: "a whole number", str: "a string", list: "a list", dict: "an object"}


def check(entry, types, where):
  """Raises ValueError unless `entry` is an object with the keys of `types`, {key: int, str, list, dict, or object for anything}."""
  annotations.require(entry, types, where)
  for key, kind in types.items():
    if not isinstance(entry[key], kind) or isinstance(entry[key], bool) and kind is not object:
      raise ValueError(f"{where}: {key} must be {_KINDS[kind]}.")


def entries(path, types, key=None, others=None):
  """The entries of a json list of objects.

  Args:
    path: the file, which may lie in an archive, see archives.py.
    types: what every entry must have, see `check`.
    key: the list is under this key of the file's one object; None: the file is the list.
    others: dict that takes the other values of that object, but for lists, which are passed over.

  Yields:
    (entry, where it stands, for messages).

  Raises:
    ValueError: not UTF-8, not json, cut off, not such a list, or an entry that `check` refuses;
      names file and entry.
  """
  with tabular.open_binary(path) as file:
    text = _Text(file, path)
    if key is None:
      yield from _checked(text.items(), types, f"{path}, entry")
    else:
      found = False
      for name in text.names():
        if name == key:
          found = True
          yield from _checked(text.items(), types, f"{path}, {key}, entry")
        elif text.peek() == "[":
          for _ in text.items():
            pass
        else:
          value = text.value()
          if others is not None:
            others[name] = value
      if not found:
        raise ValueError(f"{path}: key {key!r} is missing.")
    text.end()


def members(path, types):
  """(name, entry, where) of a json object whose values are objects that have `types`.

  Otherwise as `entries`.
  """
  with tabular.open_binary(path) as file:
    text = _Text(file, path)
    for name in text.names():
      entry, where = text.value(), f"{path}, key {name!r}"
      check(entry, types, where)
      yield name, entry, where
    text.end()


def _checked(items, types, place):
  for number, entry in enumerate(items, 1):
    where = f"{place} {number}"
    check(entry, types, where)
    yield entry, where


class _Text:
  """The text of a json file, of which only a part is in memory."""

  def __init__(self, file, path):
    self._file, self._path = io.TextIOWrapper(file, "utf-8-sig", newline=""), path
    self._text, self._at, self._before = "", 0, 0

  def items(self):
    """The values of a list that begins here."""
    yield from self._members("[", "]", lambda: self.value())

  def names(self):
    """The names of an object that begins here.

    Whoever asks for the next one must have read this one's value.
    """

    def name():
      if self.peek() != '"':
        raise self._error("a name in quotation marks should be here")
      found = self.value()
      self._take(":")
      return found

    yield from self._members("{", "}", name)

  def _members(self, opening, closing, read):
    self._take(opening)
    if self.peek() == closing:
      self._take(closing)
      return
    while True:
      yield read()
      if self._take("," + closing) == closing:
        return

  def value(self):
    """The value that begins here."""
    self.peek()
    while True:
      try:
        found, end = _DECODER.raw_decode(self._text, self._at)
      except json.JSONDecodeError as error:
        if self._more():  # the value may go on there
          continue
        self._at = error.pos
        raise self._error(error.msg) from None
      except RecursionError:
        raise self._error("lists or objects are nested too deeply") from None
      if end == len(self._text) and self._more():  # a number may go on there
        continue
      self._at = end
      return found

  def peek(self):
    """The next character that is not white space; "" at the end of the file."""
    while True:
      self._at = _SPACE.match(self._text, self._at).end()
      if self._at < len(self._text):
        return self._text[self._at]
      if not self._more():
        return ""

  def end(self):
    """Raises ValueError unless this is the end of the file."""
    if self.peek():
      raise self._error("there is more behind the end")

  def _take(self, expected):
    """The next character, which must be one of `expected`."""
    found = self.peek()
    if not found or found not in expected:
      raise self._error(
        f"{' or '.join(expected)} should be here" if found else "the file is cut off"
      )
    self._at += 1
    return found

  def _more(self):
    """Reads on, at least as much as is left, so that a long value is tried few times.

    Returns whether there was anything.
    """
    try:
      chunk = self._file.read(max(_CHUNK, len(self._text) - self._at))
    except UnicodeDecodeError:
      raise ValueError(f"{self._path} is not UTF-8 text.") from None
    self._before += self._at
    self._text, self._at = self._text[self._at :] + chunk, 0
    return bool(chunk)

  def _error(self, problem):
    return ValueError(
      f"{self._path}, character {self._before + self._at + 1}: not valid JSON ({problem}); get "
      f"the file again."
    )
