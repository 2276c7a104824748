"""Reading annotation files: json lists, and jsonl with one object a line. Messages say which file, and which entry or line.

Entries and lines are counted from 1.
"""

import json
import pathlib
from collections.abc import Iterator


def entries(path, keys=()) -> Iterator[tuple[dict, str]]:
  """The objects of a json list, or of a jsonl file if the name ends so, each with where it stands.

  Args:
    keys: every object must have these.

  Raises:
    ValueError: not UTF-8, not json, not a list of objects, or a key is missing.
  """
  if str(path).endswith(".jsonl"):
    numbered = ((_parse(line, path, number), f"{path}, line {number}")
                for number, line in enumerate(_read_text(path).split("\n"), 1) if line.strip())
  else:
    values = read_json(path)
    if not isinstance(values, list):
      raise ValueError(f"{path} must hold a json list of objects, not a {type(values).__name__}.")
    numbered = ((value, f"{path}, entry {number}") for number, value in enumerate(values, 1))
  for entry, where in numbered:
    require(entry, keys, where)
    yield entry, where


def require(entry, keys, where) -> None:
  """Raises ValueError unless `entry` is an object that has `keys`."""
  if not isinstance(entry, dict):
    raise ValueError(f"{where}: must be an object with {', '.join(keys)}, not a {type(entry).__name__}.")
  for key in keys:
    if key not in entry:
      raise ValueError(f"{where}: key {key!r} is missing.")


def require_texts(entry, keys, where) -> None:
  """Raises ValueError for those of `keys` that are there and hold no string."""
  for key in keys:
    if not isinstance(entry.get(key, ""), str):
      raise ValueError(f"{where}: {key} must be a string.")


def text_list(entry, key, where) -> list[str]:
  """A field that is a string or a list of strings, as a list. Raises ValueError for anything else."""
  values = entry[key]
  values = [values] if isinstance(values, str) else values
  if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
    raise ValueError(f"{where}: {key} must be a string or a list of strings.")
  return values


def split_files(data, split) -> list[str]:
  """The files of a split: data.train_files (a list), data.val_file or data.test_file.

  Raises:
    ValueError: the key is not set. FileNotFoundError: it names no file.
  """
  if split != "train":
    return [configured_file(data, f"{split}_file")]
  if not data.get("train_files") or isinstance(data["train_files"], str):
    raise ValueError("data.train_files must be a list of at least one file.")
  return [_existing(path, "train_files") for path in data["train_files"]]


def configured_file(data, key) -> str:
  """The file that data[key] names; errors as of `split_files`."""
  if not data.get(key):
    raise ValueError(f"data.{key} is not set, and source {data['name']} needs it here.")
  return _existing(data[key], key)


def _existing(path, key):
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(f"data.{key} names {path}, which does not exist or is not a file.")
  return path


class ImagePaths:
  """Image names of annotations -> paths under a root. The first few must exist, for a wrong root shows there.

  The others are found missing when they are read: a million look-ups on a network disk take minutes.
  """

  _CHECKED = 3

  def __init__(self):
    self._left = self._CHECKED

  def __call__(self, root, key, image, where) -> str:
    """root: folder, of data[key]. Raises ValueError: no root; FileNotFoundError: one of the first images is missing."""
    if not root:
      raise ValueError(f"{where}: its image {image!r} needs data.{key}, which is not set.")
    path = pathlib.Path(root, image)
    if self._left > 0:
      self._left -= 1
      if not path.is_file():
        raise FileNotFoundError(f"{where}: image {path} does not exist; check data.{key}.")
    return str(path)


def _read_text(path):
  try:
    return pathlib.Path(path).read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8 text (byte {error.start}).") from None


def read_json(path):
  """The value of a json file. Raises ValueError with line and column."""
  return _parse(_read_text(path), path, 1)


def _parse(text, path, first_line):
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    line = first_line + error.lineno - 1
    raise ValueError(f"{path}, line {line}, column {error.colno}: not valid JSON ({error.msg}).") from None
