"""Reading annotation files: JSON lists, JSON lines, CSV, TSV and Parquet.

Messages name the file and the entry, line or row; entries and lines are counted from 1, rows as in
tabular.py. config.data.fields renames the keys of any file, for every source.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mplug_jax.data.storage import archives, json_values, tabular
from mplug_jax.data.storage.json_files import lines, read_json

# Keys with numbers, which JSON writes as numbers; CSV has only text.
_NUMBERS = ("question_id", "image_id", "id", "ref_id")
_LISTED = 12  # keys of an entry that a message names


class Fields:
  """The keys of entries, as the source names them and as config.data.fields renames them.

  Attributes:
    keys: keys that every entry must have, in the source's names.
    known: all keys that the source reads.
    checks: counts what the entries repeat, and their invalid texts; config.data.strict refuses it.
  """

  def __init__(self, data: Mapping[str, Any], keys: Iterable[str], optional: Iterable[str] = ()):
    """Reads config.data.fields.

    Args:
      data: config.data; `fields` is "OURS=THEIRS,...": the source reads key THEIRS of the files as
        OURS.
      keys: keys that every entry must have.
      optional: other keys that the source reads.

    Raises:
      ValueError: `fields` is malformed, or names a key that the source does not read.
    """
    self.keys = tuple(keys)
    self.known = tuple(dict.fromkeys((*self.keys, *optional)))
    self._names: dict[str, str] = {}  # key of the source -> key in the files
    for part in filter(None, map(str.strip, data.get("fields", "").split(","))):
      key, equals, name = (text.strip() for text in part.partition("="))
      if not (key and equals and name):
        raise ValueError(
          f"config.data.fields: {part!r} must be written OURS=THEIRS, with a comma before the next."
        )
      if key not in self.known:
        raise ValueError(
          f"config.data.fields: {key!r} is no key of source {data['name']}, which knows "
          f"{', '.join(self.known)}."
        )
      if key in self._names:
        raise ValueError(f"config.data.fields names {key!r} twice.")
      self._names[key] = name
    self._unseen = set(self._names.values())
    self.checks = json_values.Checks(data.get("strict", False))

  def file_key(self, key: str) -> str:
    """Returns the name of a key in the files."""
    return self._names.get(key, key)

  def rename(self, entry: Any, location: str, table: bool = False) -> dict[str, Any]:
    """Renames the keys of an entry to those of the source.

    Args:
      entry: the entry as the file has it.
      location: its file and entry, line or row, for messages.
      table: whether it is a row of a table, whose empty cells are None and are dropped.

    Returns:
      The entry under the source's keys, with every required one.

    Raises:
      ValueError: it is no object, or a required key is missing.
    """
    if not isinstance(entry, dict):
      raise ValueError(
        f"{location}: must be an object with {', '.join(self.keys)}, not a {type(entry).__name__}."
      )
    renamed = entry
    if self._names:
      self._unseen -= entry.keys()
      affected = self._names.keys() | self._names.values()
      renamed = {key: value for key, value in entry.items() if key not in affected}
      renamed |= {key: entry[name] for key, name in self._names.items() if name in entry}
    if table:
      renamed = {key: value for key, value in renamed.items() if value is not None}
    for key in self.keys:
      if key not in renamed:
        raise ValueError(f"{location}: {self._missing(key, entry)}")
    return renamed

  def check_columns(self, columns: Iterable[str], path: archives.StrPath) -> None:
    """Checks that a table has the column of every required key.

    Args:
      columns: names of its columns.
      path: the table.

    Raises:
      ValueError: a column is missing.
    """
    columns = tuple(columns)
    self._unseen -= set(columns)
    for key in self.keys:
      if self.file_key(key) not in columns:
        raise ValueError(f"{path}: {self._missing(key, columns)}")

  def check_used(self, paths: Iterable[archives.StrPath]) -> None:
    """Checks that entries had the keys that config.data.fields names.

    Args:
      paths: the files that were read.

    Raises:
      ValueError: no entry so far had one of these keys.
    """
    for key, name in self._names.items():
      if name in self._unseen:
        raise ValueError(
          f"{', '.join(map(str, paths))}: no entry has the key {name!r}, which "
          f"config.data.fields names for {key!r}."
        )

  def _missing(self, key: str, available: Iterable[Any]) -> str:
    """Says that an entry, or a table with these columns, lacks a key."""
    name = self.file_key(key)
    names = list(map(str, available))
    if isinstance(available, dict) and available.get(name, "") is None:
      return f"{name!r} is empty."  # a cell
    more = " ..." if len(names) > _LISTED else ""
    has = f"it has {', '.join(names[:_LISTED])}{more}" if names else "it is empty"
    if name != key:
      return f"key {name!r}, which config.data.fields names for {key!r}, is missing; {has}."
    return f"key {key!r} is missing; {has}; name it with --config.data.fields={key}=..."


def entries(path: archives.StrPath, fields: Fields) -> Iterator[tuple[dict[str, Any], str]]:
  """Reads the objects of a JSON list, or of the lines or rows of another format.

  Args:
    path: the file; tabular.kind tells its format by its name.
    fields: the keys of the entries.

  Yields:
    (entry under the source's keys, its location for messages).

  Raises:
    ValueError: not UTF-8, not in its format, not a list of objects, or a key is missing.
  """
  kind = tabular.kind(path)
  if kind == "jsonl":
    for value, location in lines(path, fields.checks):
      yield fields.rename(value, location), location
  elif kind == "json":
    values = read_json(path, fields.checks)
    if not isinstance(values, list):
      raise ValueError(f"{path} must hold a json list of objects, not a {type(values).__name__}.")
    for number, value in enumerate(values, 1):
      location = f"{path}, entry {number}"
      yield fields.rename(value, location), location
  else:
    columns, rows = tabular.open_table(path, {fields.file_key(key) for key in fields.known})
    fields.check_columns(columns, path)
    for row, location in rows:
      if any(isinstance(value, (list, dict)) for value in row.values()):  # of JSON
        row = fields.checks.value(row, location)
      entry = fields.rename(row, location, table=True)
      if kind != "parquet":
        entry |= {key: _number(entry[key]) for key in _NUMBERS if key in entry}
      yield entry, location


def _number(value: Any) -> Any:
  """Converts text that is written as a whole number to int; returns anything else unchanged."""
  if isinstance(value, str) and re.fullmatch(r"0|-?[1-9]\d{0,18}", value, re.ASCII):
    return int(value)
  return value


def split_entries(
  data: Mapping[str, Any], split: str, keys: Iterable[str], optional: Iterable[str] = ()
) -> Iterator[tuple[dict[str, Any], str]]:
  """Reads the entries of all files of a split.

  Args:
    data: config.data.
    split: "train", "val" or "test".
    keys: keys that every entry must have.
    optional: other keys that the source reads.

  Yields:
    (entry under the source's keys, its location for messages).

  Raises:
    ValueError, FileNotFoundError: as in Fields, `split_files` and `entries`.
  """
  fields = Fields(data, keys, optional)
  paths = split_files(data, split)
  for path in paths:
    yield from entries(path, fields)
  fields.checks.report(", ".join(map(str, paths)))
  if split == "train":  # other splits may lack optional keys, such as the answers of a test split
    fields.check_used(paths)


def require(entry: Any, keys: Iterable[str], location: str) -> None:
  """Checks that `entry` is an object with `keys`.

  Args:
    entry: any value of a file.
    keys: keys it must have.
    location: its location, for messages.

  Raises:
    ValueError: it is no object, or a key is missing.
  """
  if not isinstance(entry, dict):
    raise ValueError(
      f"{location}: must be an object with {', '.join(keys)}, not a {type(entry).__name__}."
    )
  for key in keys:
    if key not in entry:
      raise ValueError(f"{location}: key {key!r} is missing.")


def require_texts(entry: Mapping[str, Any], keys: Iterable[str], location: str) -> None:
  """Checks that those of `keys` that an entry has hold strings.

  Args:
    entry: an entry of a file.
    keys: keys to check.
    location: its location, for messages.

  Raises:
    ValueError: a value is no string.
  """
  for key in keys:
    if not isinstance(entry.get(key, ""), str):
      raise ValueError(f"{location}: {key} must be a string.")


def text_list(entry: Mapping[str, Any], key: str, location: str) -> list[str]:
  """Returns a field that is a string or a list of strings as a list.

  Args:
    entry: an entry of a file.
    key: the field.
    location: the entry's location, for messages.

  Raises:
    ValueError: it is anything else.
  """
  values = entry[key]
  if isinstance(values, str):
    return [values]
  if isinstance(values, list):
    for value in values:  # a comprehension takes 1.5 times as long, on millions of lists
      if not isinstance(value, str):
        break
    else:
      return values
  raise ValueError(f"{location}: {key} must be a string or a list of strings.")


def split_files(data: Mapping[str, Any], split: str) -> list[str]:
  """Returns the files of a split: data.train_files (a list), data.val_file or data.test_file.

  Args:
    data: config.data.
    split: "train", "val" or "test".

  Raises:
    ValueError: as in `split_names`.
    FileNotFoundError: a file does not exist.
  """
  key = "train_files" if split == "train" else f"{split}_file"
  return [_existing(path, key) for path in split_names(data, split)]


def split_names(data: Mapping[str, Any], split: str) -> list[str]:
  """Returns the names, of files or patterns, that config.data has for a split.

  Args:
    data: config.data.
    split: "train", "val" or "test".

  Raises:
    ValueError: the key is not set.
  """
  if split != "train":
    return [_configured(data, f"{split}_file")]
  if not data.get("train_files") or isinstance(data["train_files"], str):
    raise ValueError("data.train_files must be a list of at least one file.")
  return list(data["train_files"])


def configured_file(data: Mapping[str, Any], key: str) -> str:
  """Returns the file that data[key] names.

  Args:
    data: config.data.
    key: one of its keys.

  Raises:
    ValueError: the key is not set.
    FileNotFoundError: the file does not exist.
  """
  return _existing(_configured(data, key), key)


def _configured(data: Mapping[str, Any], key: str) -> str:
  """Returns data[key]; raises ValueError if it is not set."""
  if not data.get(key):
    raise ValueError(f"data.{key} is not set, and source {data['name']} needs it here.")
  return data[key]


def _existing(path: str, key: str) -> str:
  """Returns the path; raises FileNotFoundError unless it is a file."""
  if not os.path.isfile(path):
    raise FileNotFoundError(f"data.{key} names {path}, which does not exist or is not a file.")
  return path
