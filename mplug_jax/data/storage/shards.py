"""Image-text pairs from shards, by the million: WebDataset tars (tar_index.py) and ArrayRecord.

Shards are random access like every other source, without a shuffle buffer: an epoch shows every
pair once in an order that is shuffled as a whole, any number of processes shares shards of any
sizes, even a single one, and a run resumes at the exact pair. The headers of a tar are read once;
after that, a pair is one read of the bytes of its members. Where far jumps are slow,
data.shuffle_block keeps neighbors together, see pipeline.py.

A record of an ArrayRecord file is a msgpack map (https://msgpack.org), which any language can read
and write:

    {"image": encoded bytes, "caption": text, "key": text that is unique to the pair}

tools.prepare_data converts tars to such files. Write others with group_size:1; otherwise reading
one record unpacks many.

An image's id in results and messages is SHARD/KEY. Tars are on a disk or where fsspec reaches;
ArrayRecord files are on a disk or at gs://, which its package reads.
"""

import bisect
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int

from mplug_jax.data.errors import ImageError, note
from mplug_jax.data.images.suffixes import IMAGE_SUFFIXES
from mplug_jax.data.storage import json_values, remote, tar_index
from mplug_jax.data.text import unicode

# TFDS puts numbers behind the suffix.
_ARRAY_RECORD = re.compile(r"\.array_?record(?:-\d+-of-\d+|-[*?\[{][^/]*|\*)?$")
_GAP = 1 << 16  # bytes between image and text up to which one read covers both
_THREADS = 16

# What tar_index counts: sentences on it, with its number and the first of it.
_LEFT_OUT = {
  tar_index.NO_IMAGE: "Keys without an image: {} left out, the first {}.",
  tar_index.NO_TEXT: "Keys without a text: {} left out, the first {}.",
  tar_index.UNPAIRED: "Images whose name has a dot in its key: {} left out, the first {}.",
  tar_index.SEVERAL: "Keys with more than one image, of which the first counts: {}, the first {}.",
  tar_index.REPEATED: "Pairs that repeat a key, and so cannot be told apart: {}, the first {}.",
}
_IGNORED = {tar_index.IGNORED: "Members that belong to no pair: {} ignored, the first {}."}


def is_pattern(name: str) -> bool:
  """Returns whether a name or pattern is one of shards, and not an annotation file."""
  return name.endswith(".tar") or _is_array_record(name)


def _is_array_record(name: str) -> bool:
  return bool(_ARRAY_RECORD.search(name))


class TarPairs:
  """The pairs of one tar.

  `read` and `text` raise ImageError for a damaged pair, and OSError for a file that cannot be read.
  """

  def __init__(self, index: tar_index.TarIndex):
    self._index = index
    self.path = index.path
    self.key = index.key

  def __len__(self) -> int:
    return len(self._index)

  def read(self, number: int) -> tuple[str, bytes, str]:
    """Returns (key, encoded image, caption) of a pair."""
    pair = self._index.pairs[number]
    ranges = [(int(pair[name]), int(pair[f"{name}_size"])) for name in ("image", "text")]
    first = min(start for start, _ in ranges)
    end = max(start + size for start, size in ranges)
    if end - first <= sum(size for _, size in ranges) + _GAP:
      data = remote.read(self.path, first, end - first)
      image, text = (data[start - first : start - first + size] for start, size in ranges)
    else:
      image, text = (remote.read(self.path, start, size) for start, size in ranges)
    if [len(image), len(text)] != [size for _, size in ranges]:
      raise ImageError(
        f"Pair {self.key(number)} of {self.path} cannot be read: the file became shorter."
      )
    return self.key(number), image, self._caption(number, text)

  def text(self, number: int) -> str:
    """Returns the caption of a pair, without reading its image."""
    pair = self._index.pairs[number]
    return self._caption(number, remote.read(self.path, int(pair["text"]), int(pair["text_size"])))

  def _caption(self, number: int, data: bytes) -> str:
    """Returns the caption in the bytes of a pair's text."""
    name = f"{self.key(number)} of {self.path}"
    try:
      text = unicode.decode(data, "its text")
    except ValueError as error:
      raise ImageError(f"Pair {name} cannot be used: {error}") from None
    if not self._index.pairs["is_json"][number]:
      return _cleaned(text, name)
    try:
      content = json_values.Parser().decode(text)
      caption = content["caption"]
    except (ValueError, KeyError, TypeError, RecursionError):
      raise ImageError(
        f"Pair {name} cannot be used: its text is no json object with a caption."
      ) from None
    if "caption" in json_values.repeated_keys(content):
      raise ImageError(f"Pair {name} cannot be used: it has more than one caption.")
    return _cleaned(caption, name)


class ArrayRecordPairs:
  """The pairs of one ArrayRecord file; errors as in TarPairs."""

  def __init__(self, path: str):
    """Opens a file.

    Args:
      path: the file, on a disk or at gs://.

    Raises:
      ValueError: it is no ArrayRecord file, or the package is missing.
    """
    try:
      from array_record.python import array_record_data_source
    except ImportError:
      raise ValueError(
        f"{path} can only be read with the package array_record, which exists for Linux and macOS."
      ) from None
    self.path = path
    try:
      self._records = array_record_data_source.ArrayRecordDataSource([path])
    except RuntimeError as error:
      reason = str(error).splitlines()[0].rstrip(".")
      raise ValueError(
        f"{path} is no complete ArrayRecord file ({reason}); write it again."
      ) from None

  def __len__(self) -> int:
    return len(self._records)

  def key(self, number: int) -> str:
    """Returns a name for a pair whose key cannot be read."""
    return f"record {number}"

  def read(self, number: int) -> tuple[str, bytes, str]:
    """Returns (key, encoded image, caption) of a pair."""
    import msgpack

    name = f"record {number} of {self.path}"
    try:
      record: dict[str, Any] = msgpack.unpackb(self._records[number], object_pairs_hook=_unique)
      key, image, caption = record["key"], record["image"], record["caption"]
    except (RuntimeError, ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
      reason = "no map with image, caption and key"
      if isinstance(error, UnicodeDecodeError):
        reason = "a text is not UTF-8"
      elif isinstance(error, RuntimeError):
        reason = str(error).splitlines()[0].rstrip(".")
      raise ImageError(f"Pair {name} cannot be read: {reason}.") from None
    if not isinstance(image, bytes):
      raise ImageError(f"Pair {name} cannot be used: its image is not bytes.")
    return key, image, _cleaned(caption, name)

  def text(self, number: int) -> str:
    """Returns the caption of a pair."""
    return self.read(number)[2]


Shard = TarPairs | ArrayRecordPairs


class ShardImages:
  """Shards as a source of images, see sources/caption.py.

  Every image has one caption, in lower case with single spaces. A pair that cannot be read has an
  ImageError in place of the image, which an ImageReader counts, and an empty caption.

  Attributes:
    parts: the shards.
    left_out: sentences on what belongs to a pair and is not in the result, or not distinct there.
    ignored: sentences on other members of the shards.
  """

  def __init__(
    self, parts: Iterable[Shard], left_out: Iterable[str] = (), ignored: Iterable[str] = ()
  ):
    self.parts = list(parts)
    self.left_out = tuple(left_out)
    self.ignored = tuple(ignored)
    self._ends = np.cumsum([len(part) for part in self.parts]).tolist()

  def __len__(self) -> int:
    return self._ends[-1]

  def find(self, index: int) -> tuple[Shard, int]:
    """Returns the shard of an image and its number in that shard."""
    if not 0 <= index < len(self):
      raise IndexError(f"pair {index} is not among the {len(self)} of the shards")
    number = bisect.bisect_right(self._ends, index)
    return self.parts[number], int(index) - (self._ends[number - 1] if number else 0)

  def __getitem__(self, index: int) -> dict[str, Any]:
    part, number = self.find(index)
    try:
      key, image, caption = part.read(number)
    except ImageError as error:
      key, image, caption = part.key(number), error, ""
    return {"image": image, "image_id": f"{part.path}/{key}", "captions": [caption.lower()]}

  def captions(self, index: int) -> list[str]:
    """Returns the captions of an image, without reading its pixels."""
    part, number = self.find(index)
    try:
      return [part.text(number).lower()]
    except ImageError:
      return [""]

  def counts(self) -> Int[np.ndarray, "images"]:
    """Returns the number of captions of every image."""
    return np.ones(len(self), np.int64)

  def group(self, index: int) -> None:
    """Returns None: shards have no subsets that are scored separately."""


def _cleaned(text: Any, name: str) -> str:
  """Returns a caption with single spaces; raises ImageError if it is no text, invalid or empty."""
  text = unicode.without_mark(text) if isinstance(text, str) else text
  if not isinstance(text, str) or not text.strip():
    problem = "empty" if isinstance(text, str) else "no text"
    raise ImageError(f"Pair {name} cannot be used: its caption is {problem}.")
  if unicode.invalid_unicode(text):
    raise ImageError(f"Pair {name} cannot be used: its caption is {unicode.problem(text)}.")
  return " ".join(text.split())


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
  """Returns a map of pairs; raises ValueError if a key is repeated."""
  content = dict(pairs)
  if len(content) < len(pairs):
    raise ValueError("a key is repeated")
  return content


def load(patterns: Sequence[str], strict: bool = False) -> ShardImages:
  """Loads the pairs of all shards that the patterns name.

  Keys without an image or a text, and what follows damage, are left out and counted in the log; so
  are keys that several pairs share.

  Args:
    patterns: names or patterns, see remote.expand.
    strict: raise an error instead of leaving anything out.

  Returns:
    The pairs, in the order of the patterns.

  Raises:
    FileNotFoundError: nothing matches, or a file does not exist.
    OSError: a file cannot be read.
    ValueError: a file is no shard, there is no pair at all, or, if strict, something was left out.
  """
  for pattern in patterns:
    if _is_array_record(pattern) and remote.is_remote(pattern) and not pattern.startswith("gs://"):
      raise ValueError(
        f"{pattern}: ArrayRecord files are read from a disk or gs:// only; copy or mount them."
      )
  paths = [path for pattern in patterns for path in remote.expand(pattern)]
  if other := next(itertools.filterfalse(is_pattern, paths), None):
    raise ValueError(f"{other} is no shard: their names end with .tar or .array_record.")
  different = dict.fromkeys(paths)
  indices = tar_index.load([path for path in different if not _is_array_record(path)])
  parts: dict[str, Shard] = {index.path: TarPairs(index) for index in indices}
  records = list(filter(_is_array_record, different))
  with ThreadPoolExecutor(_THREADS) as pool:
    parts.update(zip(records, pool.map(ArrayRecordPairs, records)))
  left_out, ignored = _sentences(indices, _LEFT_OUT), _sentences(indices, _IGNORED)
  left_out = [index.damage for index in indices if index.damage] + left_out
  if len(different) < len(paths):
    first = next(path for path in different if paths.count(path) > 1)
    left_out.append(
      f"Shards that are named more than once, so that their pairs cannot be told apart: "
      f"{len(paths) - len(different)}, the first {first}."
    )
  source = ShardImages((parts[path] for path in paths), left_out, ignored)
  if source.left_out and strict:
    raise ValueError(f"{source.left_out[0]} config.data.strict=True does not allow that.")
  for sentence in (*source.left_out, *source.ignored):
    note(sentence)
  if not len(source):
    message = (
      f"{', '.join(patterns)}: there is no pair of an image and a text, KEY.jpg (or "
      f"{', '.join(IMAGE_SUFFIXES[1:])}) beside KEY.txt or KEY.json."
    )
    raise ValueError(" ".join((message, *source.left_out, *source.ignored)))
  logging.info("%s: %d pairs in %d shards.", ", ".join(patterns), len(source), len(paths))
  return source


def _sentences(indices: Sequence[tar_index.TarIndex], sentences: Mapping[str, str]) -> list[str]:
  """Returns the sentences on kinds of keys and members that the tars have."""
  written: list[str] = []
  for kind, sentence in sentences.items():
    if count := sum(index.skipped.get(kind, 0) for index in indices):
      first = next(index for index in indices if kind in index.named)
      written.append(sentence.format(count, f"{first.path}/{first.named[kind][0]}"))
  return written
