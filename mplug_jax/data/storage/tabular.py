"""Annotation files as text lines, or row by row from CSV, TSV and Parquet.

No file is read as a whole. Lines are counted from 1, rows of CSV and TSV as a spreadsheet shows
them (the header is row 1), rows of Parquet from 1.
"""

import contextlib
import csv
import gzip
import pathlib
import zlib
from collections.abc import Iterator, Set
from typing import Any, BinaryIO, cast

from mplug_jax.data.storage import archives, json_values
from mplug_jax.data.text import unicode

_DELIMITERS = {"csv": ",", "tsv": "\t"}
_ROWS = 1024  # rows of a Parquet file held as Python objects

Rows = Iterator[tuple[dict[str, Any], str]]


def kind(path: archives.StrPath) -> str:
  """Returns the format of a file by its name: "jsonl", "csv", "tsv", "parquet" or else "json"."""
  suffix = pathlib.PurePath(str(path).lower().removesuffix(".gz")).suffix[1:]
  return suffix if suffix in ("jsonl", "csv", "tsv", "parquet") else "json"


@contextlib.contextmanager
def open_binary(path: archives.StrPath) -> Iterator[BinaryIO]:
  """Opens a file, unpacked if its name ends with ".gz".

  Args:
    path: the file, which may be in an archive, see archives.py.

  Yields:
    The open file.

  Raises:
    ValueError: the gzip data that the block reads is damaged, or as in archives.open_bytes.
    FileNotFoundError, OSError: as in archives.open_bytes.
  """
  unpack = gzip.open if str(path).lower().endswith(".gz") else open
  try:
    with archives.local_file(path) as local, unpack(local, "rb") as file:
      yield cast(BinaryIO, file)
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    reason = str(error).rstrip(".")
    raise ValueError(f"{path} is not a complete gzip file ({reason}); write it again.") from None


def lines(path: archives.StrPath) -> Iterator[str]:
  """Reads the lines of UTF-8 text, with or without a byte order mark.

  Args:
    path: the file, see `open_binary`.

  Yields:
    Each line with its line end.

  Raises:
    ValueError: it is not UTF-8.
  """
  with open_binary(path) as file:
    try:
      yield from unicode.text_file(file, newline="\n")
    except UnicodeDecodeError:
      raise not_utf8(path) from None


def not_utf8(path: archives.StrPath) -> ValueError:
  """Returns the error for a file that cannot be decoded; it has the first wrong byte, from 0.

  Args:
    path: the file, see `open_binary`.
  """
  offset = 0
  beginning = b""
  with open_binary(path) as file:
    for line in file:
      beginning = beginning or line[:4]
      try:
        line.decode("utf-8")
      except UnicodeDecodeError as error:
        offset += error.start
        break
      offset += len(line)
  return ValueError(f"{path} {unicode.not_utf8(beginning, offset)}.")


def open_table(path: archives.StrPath, wanted: Set[str] | None = None) -> tuple[list[str], Rows]:
  """Opens a CSV, TSV or Parquet file.

  A cell of CSV and TSV is text, or a JSON value if it begins with "[" or "{" and is valid JSON.
  Every empty cell is None.

  Args:
    path: the file; `kind` tells its format.
    wanted: names of the columns to read, if the format can skip others; None: all.

  Returns:
    (names of its columns, iterator of ({column: value}, "FILE, row N")).

  Raises:
    ValueError: not UTF-8, no header, a repeated column, or not in the format that its name says;
      from the iterator: a malformed row.
    FileNotFoundError: the file is Parquet and the package pyarrow is missing.
  """
  form = kind(path)
  return _parquet(path, wanted) if form == "parquet" else _separated(path, _DELIMITERS[form])


def _separated(path: archives.StrPath, delimiter: str) -> tuple[list[str], Rows]:
  """Opens a CSV or TSV file."""
  rows = _cells(path, delimiter)
  try:
    _, header = next(rows)
  except StopIteration:
    raise ValueError(f"{path} is empty; its first row must name the columns.") from None
  header = [name.strip() for name in header]
  _check_header(header, path, "in the first row")

  def entries() -> Rows:
    for number, cells in rows:
      location = f"{path}, row {number}"
      if len(cells) != len(header):
        raise ValueError(
          f"{location}: it has {len(cells)} cells and the first row {len(header)}; a cell with "
          f"{delimiter!r}, a line end or quotation marks needs quotation marks around it."
        )
      yield dict(zip(header, map(_value, cells))), location

  return header, entries()


def _check_header(header: list[str], path: archives.StrPath, location: str) -> None:
  """Raises ValueError if two columns have one name."""
  if repeated := sorted({name for name in header if header.count(name) > 1}):
    raise ValueError(
      f"{path}: column {repeated[0]!r} is repeated {location}, which must name every column once."
    )


def _cells(path: archives.StrPath, delimiter: str) -> Iterator[tuple[int, list[str]]]:
  """Yields (number, cells) of every row that is not blank."""
  number = 0
  reader = csv.reader(lines(path), delimiter=delimiter, strict=True)
  while True:
    number += 1
    try:
      cells = next(reader)
    except StopIteration:
      return
    except csv.Error as error:
      raise ValueError(f"{path}, row {number}: not valid {kind(path).upper()} ({error}).") from None
    if cells:
      yield number, cells


def _value(cell: str) -> Any:
  """Returns the value of a cell, see `open_table`."""
  if cell[:1] in ("[", "{"):
    with contextlib.suppress(ValueError, RecursionError):
      return json_values.Parser().decode(cell)
  return cell if cell.strip() else None


def _parquet(path: archives.StrPath, wanted: Set[str] | None) -> tuple[list[str], Rows]:
  """Opens a Parquet file."""
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError:
    raise FileNotFoundError(
      f"{path} can only be read with the package pyarrow: pip install pyarrow."
    ) from None

  @contextlib.contextmanager
  def located() -> Iterator[None]:
    try:
      yield
    except (pyarrow.ArrowException, OSError) as error:
      reason = str(error).splitlines()[0].rstrip(".")
      raise ValueError(f"{path} is not a Parquet file, or is damaged ({reason}).") from None

  with located():
    file = parquet.ParquetFile(path)
    header = file.schema_arrow.names
  _check_header(header, path, "among its columns")

  def entries() -> Rows:
    columns = None if wanted is None else [name for name in header if name in wanted]
    number = 0
    batches = file.iter_batches(_ROWS, columns=columns)
    while True:
      with located():
        batch = next(batches, None)
      if batch is None:
        return
      try:
        values = batch.to_pylist()
      except UnicodeDecodeError:
        raise _not_utf8(batch, path, number) from None
      for row in values:
        number += 1
        yield row, f"{path}, row {number}"

  return header, entries()


def _not_utf8(batch: Any, path: archives.StrPath, number: int) -> ValueError:
  """Returns the error for rows of a Parquet file, after the first `number`, with invalid text."""
  for row in range(len(batch)):
    for name, column in zip(batch.schema.names, batch.columns):
      try:
        column[row].as_py()
      except UnicodeDecodeError:
        return ValueError(f"{path}, row {number + row + 1}: column {name!r} is not UTF-8 text.")
  return ValueError(f"{path}, after row {number}: a text is not UTF-8.")
