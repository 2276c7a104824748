"""Converts the images, clips and texts given to a Predictor to rows of arrays. No JAX."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mplug_jax.data.errors import ImageError
from mplug_jax.data.images import box_transforms, ops, video
from mplug_jax.data.text import cleaning
from mplug_jax.data.text.tokenizer import pad_ids

_VIDEO_SUFFIXES = (
  ".mp4",
  ".avi",
  ".mov",
  ".mkv",
  ".webm",
  ".m4v",
  ".mpg",
  ".mpeg",
  ".wmv",
  ".flv",
  ".ogv",
  ".ts",
  ".3gp",
)
_FRAMES = 8  # of a clip, for a model that was trained on images


class Clip(NamedTuple):
  """Frames of one clip, in order, each an image in any form that `decode_image` takes."""

  frames: tuple


def is_one(image: Any) -> bool:
  """Returns whether this is one image or clip, not several."""
  return isinstance(
    image, str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray | Clip
  )


def is_clip(image: Any) -> bool:
  """Returns whether this is a Clip, an array [T, H, W, 3], or a path with a video suffix."""
  if isinstance(image, str | os.PathLike):
    return os.fspath(image).lower().endswith(_VIDEO_SUFFIXES)
  return isinstance(image, Clip) or video.is_clip(image)


def as_list(images: Any) -> list:
  """Returns one or many images as a list, in which inner lists become Clips.

  Raises:
    TypeError: neither an image nor images.
    ValueError: the list is empty.
  """
  if is_one(images):
    return [images]
  if not isinstance(images, Iterable):
    raise TypeError(
      f"An image is a path, bytes, a PIL image, an array or a Clip, not {type(images).__name__}."
    )
  listed = [
    Clip(tuple(image)) if isinstance(image, list | tuple) and not isinstance(image, Clip) else image
    for image in images
  ]
  if not listed:
    raise ValueError("The list of images is empty.")
  return listed


def identity(image: Any) -> tuple[str, Any]:
  """Returns a key that is equal for equal paths, equal bytes, or the same object."""
  if isinstance(image, str | os.PathLike):
    return "path", os.fspath(image)
  return ("bytes", image) if isinstance(image, bytes) else ("object", id(image))


Pairs = tuple[list, list[str], list[tuple[int, ...]], Callable[[Iterable], Any]]


def pairs(images: Any, texts: Any, noun: str) -> Pairs:
  """Pairs images with texts.

  Args:
    images: one or many.
    texts: one; or a list: all about one image, or for many images one text, or a list of texts,
      for each.
    noun: the text in messages.

  Returns:
    The images, the texts of all requests, the requests as tuples (number of an image,), and a
    function that nests the results of the requests as the arguments were nested.

  Raises:
    ValueError: the number of texts does not fit.
  """
  return _pairs([(image,) for image in as_list(images)], texts, noun, is_one(images), "images")


def pairs_of_images(pairs: Any, texts: Any) -> Pairs:
  """Pairs two images each with statements, see `pairs`.

  Args:
    pairs: (first, second), or a list of such pairs.
    texts: the statements.

  Returns:
    See `pairs`; requests are tuples of two image numbers.

  Raises:
    ValueError: not pairs, or the number of statements does not fit.
  """
  one = len(pairs) == 2 and all(map(is_one, pairs))
  many = [tuple(pair) for pair in ([pairs] if one else pairs)]
  if not many or not all(len(pair) == 2 and all(map(is_one, pair)) for pair in many):
    raise ValueError("compare takes a pair of images, (first, second), or a list of such pairs.")
  return _pairs(many, texts, "statement", one, "pairs")


def _pairs(groups: list[tuple], texts: Any, noun: str, one: bool, plural: str) -> Pairs:
  """Pairs groups of images (image, ...) with texts; `one`: the caller gave a single group."""
  texts = texts if isinstance(texts, str) else list(texts)
  if isinstance(texts, str):
    by_group = [texts] * len(groups)
  elif one:
    by_group = [texts]
  elif len(texts) == len(groups):
    by_group = texts
  else:
    raise ValueError(
      f"There are {len(groups)} {plural} and {len(texts)} {noun}s: give one {noun}, or one, or a "
      "list of them, for each."
    )
  images = [image for group in groups for image in group]
  width = len(groups[0])
  flat: list[str] = []
  requests: list[tuple[int, ...]] = []
  for number, group_texts in enumerate(by_group):
    listed = [group_texts] if isinstance(group_texts, str) else list(group_texts)
    flat += listed
    requests += [tuple(range(number * width, (number + 1) * width))] * len(listed)
  if not flat:
    raise ValueError(f"The list of {noun}s is empty.")

  def nest(results: Iterable) -> Any:
    remaining: Iterator = iter(results)
    nested = [
      next(remaining) if isinstance(texts, str) else [next(remaining) for _ in texts]
      for texts in by_group
    ]
    return nested[0] if one else nested

  return images, flat, requests, nest


class ImageRows:
  """Prepares images and clips as evaluation does.

  Attributes:
    frames: frames of a clip.
  """

  def __init__(self, size: int, frames: int = 0, sampling: str = "uniform"):
    """Stores the settings.

    Args:
      size: side of the model's images in pixels, S.
      frames: frames of a clip; 0, of a model trained on images: 8.
      sampling: see `video.frame_numbers`.
    """
    self._size = size
    self._sampling = sampling
    self.frames = frames or _FRAMES

  def resized(self, images: Sequence[Any]) -> dict[str, np.ndarray]:
    """Returns {"image": u8[B, S, S, 3]}, for clips u8[B, F, S, S, 3].

    Raises:
      ImageError: an image cannot be read; the message names it.
    """
    return {
      "image": np.stack(_in_threads(self._clip if is_clip(images[0]) else self._image, images))
    }

  def on_canvas(self, images: Sequence[Any]) -> dict[str, np.ndarray]:
    """Returns the rows for boxes, see mplug_jax/data/examples/grounding.py.

    Returns:
      {"image": u8[B, S, S, 3], "placed": i32[B, 4], "size": i32[B, 2]}.

    Raises:
      ImageError: an image cannot be read; the message names it.
    """
    rows = _in_threads(self._placed, images)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

  def _image(self, image: Any) -> np.ndarray:
    return ops.eval_transform(_decoded(image), self._size)

  def _clip(self, clip: Any) -> np.ndarray:
    if isinstance(clip, Clip):
      if not clip.frames:
        raise ImageError("A clip has no frames.")
      numbers = video.frame_numbers(len(clip.frames), self.frames, self._sampling)
      frames = {number: _decoded(clip.frames[number]) for number in sorted(set(numbers.tolist()))}
      return np.stack(
        [ops.eval_transform(frames[number], self._size) for number in numbers.tolist()]
      )
    if not isinstance(clip, str | os.PathLike) and (
      clip.dtype != np.uint8 or 0 in clip.shape or clip.shape[-1] != 3
    ):
      raise ImageError(
        f"A clip is uint8 of shape [T, H, W, 3], not {clip.dtype} {list(clip.shape)}."
      )
    frames: Any = video.read_clip(clip, self.frames, self._sampling)
    return np.stack([ops.eval_transform(frame, self._size) for frame in frames])

  def _placed(self, image: Any) -> dict[str, np.ndarray]:
    pixels = _decoded(image)
    canvas = box_transforms.fit(pixels, np.zeros((0, 4)), self._size)
    return {
      "image": canvas.image,
      "placed": np.array(canvas.placed, np.int32),
      "size": np.array(pixels.shape[1::-1], np.int32),
    }


def _decoded(image: Any) -> np.ndarray:
  """Decodes an image in any form to u8[H, W, 3], upright. Raises ImageError."""
  if isinstance(image, np.ndarray | Image.Image) and 0 in (
    image.shape if isinstance(image, np.ndarray) else image.size
  ):
    raise ImageError("An image has zero pixels.")
  return ops.decode_image(image)


def _in_threads(read: Callable[[Any], Any], images: Sequence[Any]) -> list:
  """Returns [read(image), ...]; decoders release Python's lock."""
  if len(images) == 1:
    return [read(images[0])]
  with ThreadPoolExecutor(min(len(images), os.cpu_count() or 1)) as pool:
    return list(pool.map(read, images))


class TextRows:
  """Tokenizes texts as evaluation does, but raises or warns where evaluation cuts them."""

  def __init__(
    self,
    noun: str,
    tokenizer: Any,
    length: int,
    max_words: int = 0,
    lower: bool = False,
    ends: bool = False,
  ):
    """Stores the settings.

    Args:
      noun: the text in messages, "question", ...
      tokenizer: the checkpoint's tokenizer.
      length: tokens of a row, L.
      max_words: clean texts as captions of at most so many words; 0: as questions.
      lower: lowercase texts.
      ends: rows end with [eos].
    """
    self._noun = noun
    self._tokenizer = tokenizer
    self._length = length
    self._max_words = max_words
    self._lower = lower
    self._ends = ends

  def __call__(self, texts: Sequence[str], truncate: bool = False) -> np.ndarray:
    """Returns the rows, i32[N, L].

    Args:
      texts: N texts.
      truncate: cut texts that are too long, with a warning, instead of raising.

    Raises:
      TypeError: a text is no string.
      ValueError: a text is empty or too long.
    """
    return np.stack([self._row(text, truncate) for text in texts])

  def _row(self, text: Any, truncate: bool) -> np.ndarray:
    if not isinstance(text, str):
      raise TypeError(f"A {self._noun} is a string, not {type(text).__name__}.")
    cleaned = self._clean(text)
    ids = self._tokenizer.encode(cleaned)
    if not cleaned.strip() or all(
      i in (self._tokenizer.bos_id, self._tokenizer.eos_id) for i in ids
    ):
      raise ValueError(f"The {self._noun} {text!r} is empty: it has no words.")
    if problem := self._too_long(text, ids):
      if not truncate:
        raise ValueError(
          f"The {self._noun} {_short(text)} has {problem}; shorten it, or cut it with "
          "truncate=True."
        )
      warnings.warn(
        f"The {self._noun} {_short(text)} has {problem}; the rest is cut.", stacklevel=2
      )
    return pad_ids(
      [ids],
      self._length,
      self._tokenizer.pad_id,
      truncate=True,
      ensure_eos=self._tokenizer.eos_id if self._ends else None,
    )[0]

  def _clean(self, text: str) -> str:
    if self._max_words:
      return cleaning.pre_caption(text, self._max_words)
    return text.lower() if self._lower else cleaning.vqa_text(text)

  def _too_long(self, text: str, ids: Sequence[int]) -> str:
    """Returns by how much the text is too long, for messages; "" if it is not."""
    if (
      self._max_words
      and (words := len(cleaning.pre_caption(text, len(text) + 1).split(" "))) > self._max_words
    ):
      return f"{words} words, more than the {self._max_words} that the model takes"
    tokens = len(ids)
    if self._ends and ids[-1] != self._tokenizer.eos_id:
      tokens += 1
    if tokens > self._length:
      return f"{tokens} tokens, more than the {self._length} that the model takes"
    return ""


def _short(text: str) -> str:
  return repr(text if len(text) <= 60 else f"{text[:57]}...")
