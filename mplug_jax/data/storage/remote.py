"""Files on a disk, or where fsspec reaches: patterns, sizes and ranges of bytes.

Remote paths are URLs such as gs://bucket/x.tar, s3://bucket/x.tar or memory://x.tar. Nothing is
kept open between calls, so any thread or process can read by the path alone.
"""

import contextlib
import glob
import itertools
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*)\}")
_GLOB = re.compile(r"[*?[]")


def is_remote(path: str) -> bool:
  """Returns whether a path is a URL, such as gs://bucket/file."""
  return "://" in path


def expand(pattern: str) -> list[str]:
  """Lists the files that a pattern names.

  Args:
    pattern: a path in which {00000..00331} counts, {a,b} lists, and *, ? and [...] match.

  Returns:
    The paths; matches of one wildcard pattern are sorted.

  Raises:
    FileNotFoundError: nothing matches, or a named file does not exist.
    ValueError, OSError: as in `located`.
  """
  paths: list[str] = []
  for path in _braces(pattern):
    matches = _remote_matches(path) if is_remote(path) else _local_matches(path)
    if not matches:
      raise FileNotFoundError(
        f"No file matches {path}." if _GLOB.search(path) else f"{path} does not exist."
      )
    paths += matches
  return paths


def _local_matches(path: str) -> list[str]:
  """Lists the files on this machine that match a path with wildcards."""
  if os.path.isfile(path):
    return [path]
  return sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))


def _remote_matches(path: str) -> list[str]:
  """Lists the remote files that match a URL with wildcards."""
  with located(path):
    filesystem, inner = _filesystem(path)
    if not _GLOB.search(path):
      return [path]
    return [filesystem.unstrip_protocol(name) for name in sorted(filesystem.glob(inner))]


def _braces(pattern: str) -> list[str]:
  """Returns a pattern with its braces expanded, in their order."""
  parts: list[list[str]] = []
  end = 0
  for match in _BRACES.finditer(pattern):
    first, last, listed = match.groups()
    parts.append([pattern[end : match.start()]])
    if first is None:
      parts.append(listed.split(","))
    else:
      numbers = range(int(first), int(last) + 1)
      parts.append([str(number).zfill(len(first)) for number in numbers])
    end = match.end()
  return ["".join(choice) for choice in itertools.product(*parts, [pattern[end:]])]


def state(path: str) -> tuple[int, str]:
  """Returns the size of a file in bytes, and a text that changes when the file is replaced.

  Args:
    path: path or URL.

  Raises:
    FileNotFoundError: it does not exist.
    ValueError, OSError: as in `located`.
  """
  if not is_remote(path):
    status = os.stat(path)
    return status.st_size, f"{status.st_size} {status.st_mtime_ns}"
  with located(path):
    filesystem, inner = _filesystem(path)
    filesystem.invalidate_cache()
    return filesystem.info(inner)["size"], filesystem.ukey(inner)


@contextlib.contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
  """Opens a file to read its bytes from the beginning; skipped blocks need not be fetched.

  Args:
    path: path or URL.

  Yields:
    The open file.

  Raises:
    FileNotFoundError, ValueError, OSError: as in `state`.
  """
  if not is_remote(path):
    with open(path, "rb") as file:
      yield file
    return
  with located(path):
    filesystem, inner = _filesystem(path)
    with filesystem.open(inner, "rb") as file:
      yield file


def read(path: str, start: int, size: int) -> bytes:
  """Reads a range of a file with one request.

  Args:
    path: path or URL.
    start: position of the first byte.
    size: number of bytes.

  Returns:
    The bytes, fewer than `size` at the end of the file.

  Raises:
    FileNotFoundError, ValueError, OSError: as in `state`.
  """
  if not is_remote(path):
    with open(path, "rb", buffering=0) as file:
      file.seek(start)
      return file.read(size)
  with located(path):
    filesystem, inner = _filesystem(path)
    return filesystem.cat_file(inner, start=start, end=start + size)


def _filesystem(path: str) -> tuple[Any, str]:
  """Returns fsspec's file system, which fsspec caches per thread and process, and its path."""
  try:
    import fsspec
  except ImportError:
    raise ValueError(
      f"{path} can only be read with the package fsspec: pip install fsspec."
    ) from None
  return fsspec.core.url_to_fs(path)


@contextlib.contextmanager
def located(path: str) -> Iterator[None]:
  """Adds the path to the errors of a remote file system.

  Args:
    path: the URL.

  Raises:
    FileNotFoundError: it does not exist.
    ValueError: a package is missing, or fsspec does not know the protocol.
    OSError: anything else, such as no network or no permission.
  """
  try:
    yield
  except FileNotFoundError:
    raise FileNotFoundError(f"{path} does not exist.") from None
  except ImportError as error:  # fsspec names the package
    raise ValueError(f"{path} cannot be read: {_sentence(error)}.") from None
  except ValueError as error:
    raise ValueError(
      str(error) if path in str(error) else f"{path} cannot be read: {_sentence(error)}."
    ) from None
  except Exception as error:  # every file system has its own
    raise OSError(f"{path} cannot be read: {_sentence(error)}.") from error


def _sentence(error: Exception) -> str:
  """Returns the first line of an error's message, without a full stop."""
  return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
