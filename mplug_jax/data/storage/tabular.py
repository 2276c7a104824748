"""Annotation files as text lines, or row by row from CSV, TSV and Parquet.

None of them is read as a whole. Messages say which row.

Lines are counted from 1, rows of CSV and TSV as a spreadsheet shows them (the header is row 1),
rows of Parquet from 1.
"""

import contextlib
import csv
import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Iterator

from mplug_jax.data.storage import archives

_DELIMITERS = {"csv": ",", "tsv": "\t"}


_ROWS = 1024  # of a Parquet file that are Python objects at a time


def kind(path) -> str:
  """The format of a file by its name: "jsonl", "csv", "tsv", "parquet"; "json" for every other name."""
  found = pathlib.PurePath(str(path).lower().removesuffix(".gz")).suffix[1:]
  return found if found in ("jsonl", "csv", "tsv", "parquet") else "json"


@contextlib.contextmanager
def open_binary(path):
  """The bytes of a file, unpacked if its name ends with ".gz"; it may lie in an archive, see archives.py.

  Raises ValueError when a block meets damaged gzip data, else as archives.open_bytes.
  """
  unpack = gzip.open if str(path).lower().endswith(".gz") else open
  try:
    with archives.local_file(path) as local, unpack(local, "rb") as file:
      yield file
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise ValueError(
      f"{path} is not a complete gzip file ({str(error).rstrip('.')}); write it anew."
    ) from None


def lines(path) -> Iterator[str]:
  """The lines of a UTF-8 text, with or without a byte order mark, each with its line end.

  Raises ValueError: it is no such text.
  """
  with open_binary(path) as file:
    try:
      yield from io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")
    except UnicodeDecodeError:
      raise ValueError(f"{path} is not UTF-8 text (byte {_first_wrong_byte(path)}).") from None


def _first_wrong_byte(path):
  """Where a file that is not UTF-8 stops to be so, from 0."""
  offset = 0
  with open_binary(path) as file:
    for line in file:
      try:
        line.decode("utf-8")
      except UnicodeDecodeError as error:
        return offset + error.start
      offset += len(line)
  return offset


def open_table(path, wanted=None) -> tuple[list[str], Iterator[tuple[dict, str]]]:
  """The columns of a CSV, TSV or Parquet file, and its rows.

  A cell of CSV and TSV is text, or what it says if it begins with "[" or "{" and is valid JSON;
  every cell that is empty is None.

  Args:
    wanted: names of the columns to read, where the format allows to skip others; None: all.

  Returns:
    (names, iterator of ({column: value}, "FILE, row N")).

  Raises:
    ValueError: not UTF-8, no header, a column twice, not in the format that its name says; from the
      iterator: a malformed row.
    FileNotFoundError: Parquet without the package pyarrow.
  """
  found = kind(path)
  return _parquet(path, wanted) if found == "parquet" else _separated(path, _DELIMITERS[found])


def _separated(path, delimiter):
  rows = _cells(path, delimiter)
  try:
    _, header = next(rows)
  except StopIteration:
    raise ValueError(f"{path} is empty; its first row must name the columns.") from None
  header = [name.strip() for name in header]
  if twice := sorted({name for name in header if header.count(name) > 1}):
    raise ValueError(
      f"{path}: column {twice[0]!r} stands twice in the first row, which must name every column "
      f"once."
    )

  def entries():
    for number, cells in rows:
      where = f"{path}, row {number}"
      if len(cells) != len(header):
        raise ValueError(
          f"{where}: it has {len(cells)} cells and the first row {len(header)}; a cell with "
          f"{delimiter!r}, a line end or "
          "quotation marks in it must stand in quotation marks."
        )
      yield dict(zip(header, map(_value, cells))), where

  return header, entries()


def _cells(path, delimiter):
  """(number, list of cells) of every row that is not blank."""
  number, reader = 0, csv.reader(lines(path), delimiter=delimiter, strict=True)
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


def _value(cell):
  """The value of a cell, see `open_table`."""
  if cell[:1] in ("[", "{"):
    with contextlib.suppress(ValueError, RecursionError):
      return json.loads(cell)
  return cell if cell.strip() else None


def _parquet(path, wanted):
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError:
    raise FileNotFoundError(
      f"{path} can only be read with the package pyarrow: pip install pyarrow."
    ) from None

  @contextlib.contextmanager
  def located():
    try:
      yield
    except (pyarrow.ArrowException, OSError) as error:
      raise ValueError(
        f"{path} is not a Parquet file, or is damaged ({str(error).splitlines()[0].rstrip('.')})."
      ) from None

  with located():
    file = parquet.ParquetFile(path)
    header = file.schema_arrow.names

  def entries():
    columns = None if wanted is None else [name for name in header if name in wanted]
    number, batches = 0, file.iter_batches(_ROWS, columns=columns)
    while True:
      with located():
        batch = next(batches, None)
      if batch is None:
        return
      for row in batch.to_pylist():
        number += 1
        yield row, f"{path}, row {number}"

  return header, entries()
