"""JSON files, and files with a JSON value on every line."""

import json
from collections.abc import Iterator
from typing import Any

from mplug_jax.data.storage import archives, json_values, tabular


def lines(
  path: archives.StrPath, checks: json_values.Checks | None = None
) -> Iterator[tuple[Any, str]]:
  """Reads the JSON value of every line that is not blank.

  Args:
    path: the file.
    checks: counts and repairs what is wrong in the values; None: repeated keys are named in the
      log, and texts that are no valid Unicode stay as they are.

  Yields:
    (value, its location for messages).

  Raises:
    ValueError: not UTF-8, or not JSON.
    RecordError: as in json_values.Checks.value.
  """
  parser = json_values.Parser()
  checks = checks or json_values.Checks(repair=False)
  for number, line in enumerate(tabular.lines(path), 1):
    if line.strip():
      value = _parse_line(parser, line, path, number)
      location = f"{path}, line {number}"
      yield checks.value(value, location) if parser.suspicious else value, location


def read_json(path: archives.StrPath, checks: json_values.Checks | None = None) -> Any:
  """Reads the value of a JSON file.

  Args:
    path: the file.
    checks: counts and repairs what is wrong in the value; None: that is named in the log.

  Raises:
    ValueError: not UTF-8, or not JSON; names line and column.
    RecordError: as in json_values.Checks.value.
  """
  parser = json_values.Parser()
  value = _parse(parser, "".join(tabular.lines(path)), path, 1)
  return (checks or json_values.Checks()).file(value, path) if parser.suspicious else value


def _parse_line(parser: json_values.Parser, line: str, path: archives.StrPath, number: int) -> Any:
  """Parses a line; the usual line takes a short cut, because millions are read before training."""
  try:
    value, end = parser.raw_decode(line)
    if line[end:] in ("\n", "", "\r\n"):
      return value
  except (ValueError, RecursionError):
    pass
  return _parse(parser, line.rstrip("\r\n"), path, number)


def _parse(parser: json_values.Parser, text: str, path: archives.StrPath, first_line: int) -> Any:
  """Parses JSON text that begins on a line of a file; raises ValueError."""
  try:
    return parser.decode(text)
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
