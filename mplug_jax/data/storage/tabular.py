"""Annotation files as text lines, or row by row from CSV, TSV and Parquet.

No file is read as a whole. Lines are counted from 1, rows of CSV and TSV as a spreadsheet shows
them (the header is row 1), rows of Parquet from 1.
"""

import contextlib
import csv
import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Iterator, Set
from typing import Any, BinaryIO, cast

from mplug_jax.data.storage import archives

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
      yield from io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")
    except UnicodeDecodeError:
      raise ValueError(f"{path} is not UTF-8 text (byte {_first_wrong_byte(path)}).") from None


def _first_wrong_byte(path: archives.StrPath) -> int:
  """Returns the position of the first byte that is not UTF-8, from 0."""
  offset = 0
  with open_binary(path) as file:
    for line in file:
      try:
        line.decode("utf-8")
      except UnicodeDecodeError as error:
        return offset + error.start
      offset += len(line)
  return offset


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
  if repeated := sorted({name for name in header if header.count(name) > 1}):
    raise ValueError(
      f"{path}: column {repeated[0]!r} is repeated in the first row, which must name every column "
      "once."
    )

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
      return json.loads(cell)
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

  def entries() -> Rows:
    columns = None if wanted is None else [name for name in header if name in wanted]
    number = 0
    batches = file.iter_batches(_ROWS, columns=columns)
    while True:
      with located():
        batch = next(batches, None)
      if batch is None:
        return
      for row in batch.to_pylist():
        number += 1
        yield row, f"{path}, row {number}"

  return header, entries()
