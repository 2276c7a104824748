"""Files on a disk, or wherever fsspec reaches (gs://bucket/x.tar, s3://bucket/x.tar, memory://x.tar): patterns, sizes and ranges of bytes.

Nothing is kept open between calls, so that any thread or process can read by the path alone.
"""

import contextlib
import glob
import itertools
import os
import re

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*)\}")
_GLOB = re.compile(r"[*?[]")


def is_remote(path) -> bool:
  """Whether a path is a URL, such as gs://bucket/file, and none of this machine."""
  return "://" in path


def expand(pattern) -> list[str]:
  """The files that a pattern names: {00000..00331} counts, {a,b} lists, *, ? and [...] match.

  Of a match the names are sorted.

  Raises:
    FileNotFoundError: nothing matches, or a file that is named does not exist. ValueError, OSError:
      as of `located`.
  """
  found = []
  for path in _braces(pattern):
    if not is_remote(path):
      matches = (
        [path]
        if os.path.isfile(path)
        else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
      )
    else:
      with located(path):
        filesystem, inner = _filesystem(path)
        matches = (
          [filesystem.unstrip_protocol(name) for name in sorted(filesystem.glob(inner))]
          if _GLOB.search(path)
          else [path]
        )
    if not matches:
      raise FileNotFoundError(
        f"{path} does not exist." if not _GLOB.search(path) else f"No file matches {path}."
      )
    found += matches
  return found


def _braces(pattern):
  """A pattern without its braces, in the order of what they list."""
  parts, end = [], 0
  for match in _BRACES.finditer(pattern):
    first, last, listed = match.groups()
    parts += [
      [pattern[end : match.start()]],
      listed.split(",")
      if first is None
      else [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)],
    ]
    end = match.end()
  return ["".join(choice) for choice in itertools.product(*parts, [pattern[end:]])]


def state(path) -> tuple[int, str]:
  """The size of a file in bytes, and a text that is another one when the file was replaced.

  Raises:
    FileNotFoundError: it does not exist. ValueError, OSError: as of `located`.
  """
  if not is_remote(path):
    status = os.stat(path)
    return status.st_size, f"{status.st_size} {status.st_mtime_ns}"
  with located(path):
    filesystem, inner = _filesystem(path)
    filesystem.invalidate_cache()
    return filesystem.info(inner)["size"], filesystem.ukey(inner)


@contextlib.contextmanager
def open_file(path):
  """A binary file to read from the beginning on.

  Blocks that are skipped need not be fetched. Errors as of `state`.
  """
  if not is_remote(path):
    with open(path, "rb") as file:
      yield file
    return
  with located(path):
    filesystem, inner = _filesystem(path)
    with filesystem.open(inner, "rb") as file:
      yield file


def read(path, start, size) -> bytes:
  """`size` bytes from `start` on, fewer at the end of the file: one request.

  Errors as of `state`.
  """
  if not is_remote(path):
    with open(path, "rb", buffering=0) as file:
      file.seek(start)
      return file.read(size)
  with located(path):
    filesystem, inner = _filesystem(path)
    return filesystem.cat_file(inner, start=start, end=start + size)


def _filesystem(path):
  """-> (fsspec's file system, the path in it). fsspec keeps one for each thread and process."""
  try:
    import fsspec
  except ImportError:
    raise ValueError(
      f"{path} can only be read with the package fsspec: pip install fsspec."
    ) from None
  return fsspec.core.url_to_fs(path)


@contextlib.contextmanager
def located(path):
  """Says of what a remote file system raises that it was at `path`.

  Raises:
    FileNotFoundError: there is no such file. ValueError: no package can read it, or fsspec knows no
      such beginning of a path.
    OSError: anything else, such as no network and no permission.
  """
  try:
    yield
  except FileNotFoundError:
    raise FileNotFoundError(f"{path} does not exist.") from None
  except ImportError as error:  # fsspec says which package
    raise ValueError(f"{path} cannot be read: {_sentence(error)}.") from None
  except ValueError as error:
    raise ValueError(
      str(error) if path in str(error) else f"{path} cannot be read: {_sentence(error)}."
    ) from None
  except Exception as error:  # every file system has its own
    raise OSError(f"{path} cannot be read: {_sentence(error)}.") from error


def _sentence(error):
  return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
