"""Pairs of an image and a text from shards, by the million: tars as img2dataset writes them (see tar_index.py), and ArrayRecord files.

Shards are random access like every other source, and not a stream with a shuffle buffer: an epoch
shows every pair once in an order that is shuffled as a whole, any number of processes shares shards
of any sizes, even a single one, and a run resumes at the very pair. Of a tar the headers are read
once; then a pair is one read of the bytes where its members lie. Where far jumps are slow,
data.shuffle_block keeps neighbours together, see pipeline.py.

A record of an ArrayRecord file is a msgpack map (https://msgpack.org), which any language can read
and write:

    {"image": encoded bytes, "caption": text, "key": text that tells the pair from all others}

tools.prepare_data makes such files of tars. Write others with group_size:1, or reading one record
unpacks many.

An image's id in results and messages is SHARD/KEY. Tars are on a disk or wherever fsspec reaches;
ArrayRecord on a disk or at gs://, as its package reads it.
"""

import bisect
import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging

from mplug_jax.data.errors import ImageError
from mplug_jax.data.storage import remote, tar_index

_ARRAY_RECORD = re.compile(
  r"\.array_?record(?:-\d+-of-\d+|-[*?\[{][^/]*|\*)?$"
)  # TFDS puts numbers behind the suffix
_GAP = 1 << 16  # bytes between image and text that are read rather than asked for twice
_THREADS = 16


def is_pattern(name) -> bool:
  """Whether a name or pattern is that of shards, and not of an annotation file."""
  return name.endswith(".tar") or _is_array_record(name)


def _is_array_record(name):
  return bool(_ARRAY_RECORD.search(name))


class ShardImages:
  """Shards as a source of images, see caption.py.

  Every image has one caption, lower-cased and with single spaces.

  A pair that cannot be read is an ImageError in place of the image, and has an empty caption: an
    ImageReader counts it.

  Args:
    parts: one TarPairs or ArrayRecordPairs for each shard.
    left_out: sentences on what the shards hold beside their pairs.
  """

  def __init__(self, parts, left_out=()):
    self.parts, self.left_out = list(parts), tuple(left_out)
    self._ends = np.cumsum([len(part) for part in self.parts]).tolist()

  def __len__(self):
    return self._ends[-1]

  def place(self, index):
    """Number of an image -> (its shard, its number there)."""
    if not 0 <= index < len(self):
      raise IndexError(f"pair {index} is not among the {len(self)} of the shards")
    number = bisect.bisect_right(self._ends, index)
    return self.parts[number], int(index) - (self._ends[number - 1] if number else 0)

  def __getitem__(self, index):
    part, number = self.place(index)
    try:
      key, image, caption = part.read(number)
    except ImageError as error:
      key, image, caption = part.key(number), error, ""
    return {"image": image, "image_id": f"{part.path}/{key}", "captions": [caption.lower()]}

  def captions(self, index):
    part, number = self.place(index)
    try:
      return [part.text(number).lower()]
    except ImageError:
      return [""]

  def counts(self):
    """i64[N]: captions of every image."""
    return np.ones(len(self), np.int64)

  def group(self, index):
    del index  # the images of shards are not scored apart


class TarPairs:
  """The pairs of one tar.

  `read` and `text` raise ImageError for a pair that is damaged, and OSError for a file that cannot
  be read.
  """

  def __init__(self, index):
    """index: a TarIndex."""
    self._index, self.path, self.key = index, index.path, index.key

  def __len__(self):
    return len(self._index)

  def read(self, number):
    """-> (key, encoded image, caption)."""
    pair = self._index.pairs[number]
    places = [(int(pair[name]), int(pair[f"{name}_size"])) for name in ("image", "text")]
    first, end = min(start for start, _ in places), max(start + size for start, size in places)
    if end - first <= sum(size for _, size in places) + _GAP:
      whole = remote.read(self.path, first, end - first)
      image, text = (whole[start - first : start - first + size] for start, size in places)
    else:
      image, text = (remote.read(self.path, *place) for place in places)
    if [len(image), len(text)] != [size for _, size in places]:
      raise ImageError(
        f"Pair {self.key(number)} of {self.path} cannot be read: the file became shorter."
      )
    return self.key(number), image, self._caption(number, text)

  def text(self, number):
    """The caption alone."""
    pair = self._index.pairs[number]
    return self._caption(number, remote.read(self.path, int(pair["text"]), int(pair["text_size"])))

  def _caption(self, number, data):
    where = f"{self.key(number)} of {self.path}"
    try:
      text = data.decode("utf-8")
      if self._index.pairs["is_json"][number]:
        text = json.loads(text)["caption"]
    except (ValueError, KeyError, TypeError, RecursionError):
      kind = "json object with a caption" if self._index.pairs["is_json"][number] else "UTF-8"
      raise ImageError(f"Pair {where} cannot be used: its text is no {kind}.") from None
    return _cleaned(text, where)


class ArrayRecordPairs:
  """The pairs of one ArrayRecord file; errors as of TarPairs."""

  def __init__(self, path):
    """Raises ValueError for a file that is none."""
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
      raise ValueError(
        f"{path} is no whole ArrayRecord file ({str(error).splitlines()[0].rstrip('.')}); make it "
        f"anew."
      ) from None

  def __len__(self):
    return len(self._records)

  def key(self, number):
    """What the pair is called when it cannot be read."""
    return f"record {number}"

  def read(self, number):
    """-> (key, encoded image, caption)."""
    import msgpack

    where = f"record {number} of {self.path}"
    try:
      record = msgpack.unpackb(self._records[number])
      key, image, caption = record["key"], record["image"], record["caption"]
    except (RuntimeError, ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
      what = (
        f"{str(error).splitlines()[0].rstrip('.')}"
        if isinstance(error, RuntimeError)
        else "no map with image, caption and key"
      )
      raise ImageError(f"Pair {where} cannot be read: {what}.") from None
    if not isinstance(image, bytes):
      raise ImageError(f"Pair {where} cannot be used: its image is not bytes.")
    return key, image, _cleaned(caption, where)

  def text(self, number):
    """The caption alone."""
    return self.read(number)[2]


def _cleaned(text, where):
  """A caption with single spaces. Raises ImageError: it is no text, or nothing is left."""
  if not isinstance(text, str) or not text.strip():
    raise ImageError(
      f"Pair {where} cannot be used: its caption is "
      f"{'empty' if isinstance(text, str) else 'no text'}."
    )
  return " ".join(text.split())


def load(patterns, strict=False) -> ShardImages:
  """The pairs of all files that the patterns name, in that order.

  What tars hold without an image or a text is left out, and what stands behind damage; both are
  counted in the log.

  Args:
    patterns: see storage.expand. strict: refuse them instead.

  Raises:
    FileNotFoundError: nothing matches, or a file does not exist. OSError: one cannot be read.
    ValueError: one is no shard, there is no pair in any, or, if strict, something was left out.
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
  parts = {index.path: TarPairs(index) for index in indices}
  with ThreadPoolExecutor(_THREADS) as pool:
    records = list(filter(_is_array_record, different))
    parts |= zip(records, pool.map(ArrayRecordPairs, records))
  source = ShardImages((parts[path] for path in paths), _left_out(indices))
  if source.left_out and strict:
    raise ValueError(f"{source.left_out[0]} config.data.strict=True allows no such thing.")
  for sentence in source.left_out:
    logging.warning("%s", sentence)
  if not len(source):
    raise ValueError(
      " ".join(
        (
          f"{', '.join(patterns)}: there is no pair of an image and a text, KEY.jpg (.jpeg, .png, "
          f".webp) beside "
          "KEY.txt or KEY.json.",
          *source.left_out,
        )
      )
    )
  logging.info("%s: %d pairs in %d shards.", ", ".join(patterns), len(source), len(paths))
  return source


def _left_out(indices):
  """What a list of TarIndex says of members that are no pairs, as sentences."""
  found = [index.damage for index in indices if index.damage]
  for what in (tar_index.NO_IMAGE, tar_index.NO_TEXT):
    if count := sum(index.skipped.get(what, 0) for index in indices):
      index = next(index for index in indices if what in index.named)
      found.append(
        f"Keys without {what}: {count} left out, the first {index.path}/{index.named[what][0]}."
      )
  return found
