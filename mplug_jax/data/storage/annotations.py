"""Reading annotation files: json lists, jsonl with one object a line, CSV, TSV and Parquet with one a row.

Messages say which file, and which entry, line or row; entries and lines are counted from 1, rows as
tables.py says. Keys that are called otherwise in a file are renamed here, for every source.
"""

import json
import pathlib
import re
from collections.abc import Iterator

from mplug_jax.data.storage import archives, tabular

_NUMBERS = (
  "question_id",
  "image_id",
  "id",
  "ref_id",
)  # what json writes as a number, though CSV knows only text
_LISTED = 12  # keys of an entry that a message names


class Fields:
  """The keys of entries, as the source knows them and as config.data.fields renames them.

  Args:
    data: config.data; `fields` is "OURS=THEIRS,...": key THEIRS of the files is what the source
      knows as OURS.
    keys: every entry must have these.
    optional: what else the source knows.

  Raises:
    ValueError: `fields` is malformed, or names a key that the source does not know.
  """

  def __init__(self, data, keys, optional=()):
    self.keys = tuple(keys)
    self.known = tuple(dict.fromkeys((*keys, *optional)))
    self._theirs = {}
    for part in filter(None, map(str.strip, data.get("fields", "").split(","))):
      ours, equals, theirs = (text.strip() for text in part.partition("="))
      if not (ours and equals and theirs):
        raise ValueError(
          f"config.data.fields: {part!r} must be written OURS=THEIRS, with a comma before the next."
        )
      if ours not in self.known:
        raise ValueError(
          f"config.data.fields: {ours!r} is no key of source {data['name']}, which knows "
          f"{', '.join(self.known)}."
        )
      if ours in self._theirs:
        raise ValueError(f"config.data.fields names {ours!r} twice.")
      self._theirs[ours] = theirs
    self._unseen = set(self._theirs.values())

  def theirs(self, key):
    """What the files call a key."""
    return self._theirs.get(key, key)

  def rename(self, entry, where, table=False) -> dict:
    """An entry of a file -> under our keys, those that every entry must have among them.

    Args:
      where: its place, for messages. table: it is a row of a table, whose empty cells are None and
        are left out.

    Raises:
      ValueError: it is no object, or a key is missing.
    """
    if not isinstance(entry, dict):
      raise ValueError(
        f"{where}: must be an object with {', '.join(self.keys)}, not a {type(entry).__name__}."
      )
    found = entry
    if self._theirs:
      self._unseen -= entry.keys()
      renamed = self._theirs.keys() | self._theirs.values()
      found = {key: value for key, value in entry.items() if key not in renamed}
      found |= {ours: entry[theirs] for ours, theirs in self._theirs.items() if theirs in entry}
    if table:
      found = {key: value for key, value in found.items() if value is not None}
    for key in self.keys:
      if key not in found:
        raise ValueError(f"{where}: {self._missing(key, entry)}")
    return found

  def check_columns(self, columns, path) -> None:
    """Raises ValueError for a table that lacks the column of a key that every entry must have."""
    self._unseen -= set(columns)
    for key in self.keys:
      if self.theirs(key) not in columns:
        raise ValueError(f"{path}: {self._missing(key, columns)}")

  def check_used(self, paths) -> None:
    """Raises ValueError if no entry so far had one of the keys that config.data.fields names."""
    for ours, theirs in self._theirs.items():
      if theirs in self._unseen:
        raise ValueError(
          f"{', '.join(map(str, paths))}: no entry has the key {theirs!r}, which "
          f"config.data.fields names for {ours!r}."
        )

  def _missing(self, key, there):
    """What is to be said of a key that an entry with the keys `there` lacks."""
    theirs, names = self.theirs(key), list(map(str, there))
    if isinstance(there, dict) and there.get(theirs, "") is None:  # of a table
      return f"{theirs!r} is empty."
    has = (
      f"it has {', '.join(names[:_LISTED])}{' ...' * (len(names) > _LISTED)}"
      if names
      else "it is empty"
    )
    if theirs != key:
      return f"key {theirs!r}, which config.data.fields names for {key!r}, is missing; {has}."
    return f"key {key!r} is missing; {has}; name it with --config.data.fields={key}=..."


def entries(path, fields) -> Iterator[tuple[dict, str]]:
  """The objects of a json list, or of the lines or rows of another format (see tables.kind), each with where it stands.

  Args:
    fields: Fields of the entries.

  Raises:
    ValueError: not UTF-8, not in its format, not a list of objects, or a key is missing.
  """
  kind = tabular.kind(path)
  if kind == "jsonl":
    for value, where in lines(path):
      yield fields.rename(value, where), where
  elif kind == "json":
    values = read_json(path)
    if not isinstance(values, list):
      raise ValueError(f"{path} must hold a json list of objects, not a {type(values).__name__}.")
    for number, value in enumerate(values, 1):
      where = f"{path}, entry {number}"
      yield fields.rename(value, where), where
  else:
    columns, rows = tabular.open_table(path, {fields.theirs(key) for key in fields.known})
    fields.check_columns(columns, path)
    for row, where in rows:
      entry = fields.rename(row, where, table=True)
      yield (
        entry
        if kind == "parquet"
        else entry | {key: _number(entry[key]) for key in _NUMBERS if key in entry},
        where,
      )


def lines(path) -> Iterator[tuple[object, str]]:
  """The json value on every line that is not blank, and where it stands.

  Raises ValueError: not UTF-8, or not JSON.
  """
  for number, line in enumerate(tabular.lines(path), 1):
    if line.strip():
      yield _parse_line(line, path, number), f"{path}, line {number}"


def _number(value):
  """A whole number written as text -> int, if it is written as numbers are.

  Anything else as it is.
  """
  return (
    int(value)
    if isinstance(value, str) and re.fullmatch(r"0|-?[1-9]\d{0,18}", value, re.ASCII)
    else value
  )


def split_entries(data, split, keys, optional=()) -> Iterator[tuple[dict, str]]:
  """The entries of all files of a split, renamed by config.data.fields.

  Arguments and errors as of Fields, split_files and entries.
  """
  fields, paths = Fields(data, keys, optional), split_files(data, split)
  for path in paths:
    yield from entries(path, fields)
  if (
    split == "train"
  ):  # what evaluation can do without, a test split's answers say, need not be there
    fields.check_used(paths)


def require(entry, keys, where) -> None:
  """Raises ValueError unless `entry` is an object that has `keys`."""
  if not isinstance(entry, dict):
    raise ValueError(
      f"{where}: must be an object with {', '.join(keys)}, not a {type(entry).__name__}."
    )
  for key in keys:
    if key not in entry:
      raise ValueError(f"{where}: key {key!r} is missing.")


def require_texts(entry, keys, where) -> None:
  """Raises ValueError for those of `keys` that are there and hold no string."""
  for key in keys:
    if not isinstance(entry.get(key, ""), str):
      raise ValueError(f"{where}: {key} must be a string.")


def text_list(entry, key, where) -> list[str]:
  """A field that is a string or a list of strings, as a list.

  Raises ValueError for anything else.
  """
  values = entry[key]
  if isinstance(values, str):
    return [values]
  if isinstance(values, list):
    for value in values:  # a comprehension would take half as long again, of millions of lists
      if not isinstance(value, str):
        break
    else:
      return values
  raise ValueError(f"{where}: {key} must be a string or a list of strings.")


def split_files(data, split) -> list[str]:
  """The files of a split: data.train_files (a list), data.val_file or data.test_file.

  Errors as of `split_names`.

  Raises:
    FileNotFoundError: a name is that of no file.
  """
  return [
    _existing(path, "train_files" if split == "train" else f"{split}_file")
    for path in split_names(data, split)
  ]


def split_names(data, split) -> list[str]:
  """What data.train_files (a list), data.val_file or data.test_file names, be it a file or a pattern. Raises ValueError: it is not set."""
  if split != "train":
    return [_configured(data, f"{split}_file")]
  if not data.get("train_files") or isinstance(data["train_files"], str):
    raise ValueError("data.train_files must be a list of at least one file.")
  return list(data["train_files"])


def configured_file(data, key) -> str:
  """The file that data[key] names; errors as of `split_files`."""
  return _existing(_configured(data, key), key)


def _configured(data, key):
  if not data.get(key):
    raise ValueError(f"data.{key} is not set, and source {data['name']} needs it here.")
  return data[key]


def _existing(path, key):
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(f"data.{key} names {path}, which does not exist or is not a file.")
  return path


class ImagePaths:
  """Image names of annotations -> paths under a root.

  The first few must exist, for a wrong root shows there.

  The root, or the beginning of a name, may be an archive, see archives.py. The other images are
    found missing when they are read: a
  million look-ups on a network disk take minutes.
  """

  _CHECKED = 3

  def __init__(self):
    self._left = self._CHECKED

  def __call__(self, root, key, image, where) -> str:
    """root: folder or archive, of data[key]. A name that is an absolute path needs none.

    Raises:
      ValueError: no root, or an archive in which nothing can be found.
      FileNotFoundError: one of the first images is missing.
    """
    if not root and not image.startswith("/"):
      raise ValueError(f"{where}: its image {image!r} needs data.{key}, which is not set.")
    path = f"{root}/{image}" if root and not image.startswith("/") else image
    if "//" in path or "./" in path or path[-1:] == "/" or path[-2:] == "/.":
      path = str(
        pathlib.PurePath(path)
      )  # the same file has one name; only where needed, for a million takes long
    if self._left > 0:
      self._left -= 1
      try:
        there = archives.is_file(path)
      except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
      if not there:
        raise FileNotFoundError(f"{where}: image {path} does not exist; check data.{key}.")
    return path


def read_json(path):
  """The value of a json file. Raises ValueError with line and column."""
  return _parse("".join(tabular.lines(path)), path, 1)


def _parse_line(line, path, number):
  """The value in a line of a file.

  A million of them are read before training, so the usual line takes the short way.
  """
  try:
    value, end = _decode(line)
    if line[end:] in ("\n", "", "\r\n"):
      return value
  except (ValueError, RecursionError):
    pass
  return _parse(line.rstrip("\r\n"), path, number)


_decode = json.JSONDecoder().raw_decode


def _parse(text, path, first_line):
  try:
    return json.loads(text)
  except RecursionError:
    raise ValueError(
      f"{path}, line {first_line}: lists or objects are nested too deeply."
    ) from None
  except json.JSONDecodeError as error:
    line = first_line + error.lineno - 1
    message = f"{path}, line {line}, column {error.colno}: not valid JSON ({error.msg})"
    if error.msg == "Extra data" and tabular.kind(path) == "json":
      message += "; a file with an object on every line must be called .jsonl"
    raise ValueError(f"{message}.") from None
