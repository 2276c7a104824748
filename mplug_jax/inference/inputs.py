"""Converts the images, clips and texts given to a Predictor to rows of arrays. No JAX."""

import os
import warnings
from collections.abc import Iterable, Sequence
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
    raise ValueError("There is no image: the list is empty.")
  return listed


def identity(image: Any) -> tuple[str, Any]:
  """Returns a key that is equal for equal paths, equal bytes, or the same object."""
  if isinstance(image, str | os.PathLike):
    return "path", os.fspath(image)
  return ("bytes", image) if isinstance(image, bytes) else ("object", id(image))


def pairs(images, texts, what):
  """What is asked about which image -> (images, texts of all requests, requests [(number of an image,), ...], function: results of the
  requests -> one, a list, or a list of lists, as the arguments were).

  Args:
    images: one or many. texts: one; of one image a list; of many images a list with a text, or a list of texts, for each.

  Raises:
    ValueError: as many texts as images are needed.
  """
  return _pairs([(image,) for image in as_list(images)], texts, what, is_one(images), "images")


def pairs_of_images(pairs, texts):
  """`pairs` for statements about two images; pairs: (first, second), or a list of such. Raises ValueError."""
  one = len(pairs) == 2 and all(map(is_one, pairs))
  many = [tuple(pair) for pair in ([pairs] if one else pairs)]
  if not many or not all(len(pair) == 2 and all(map(is_one, pair)) for pair in many):
    raise ValueError("compare takes a pair of images, (first, second), or a list of such pairs.")
  return _pairs(many, texts, "statement", one, "pairs")


def _pairs(groups, texts, what, one, many):
  """groups: [(image, ...)], what each text is about."""
  texts = texts if isinstance(texts, str) else list(texts)
  if isinstance(texts, str):
    asked = [texts] * len(groups)
  elif one:
    asked = [texts]
  elif len(texts) == len(groups):
    asked = texts
  else:
    raise ValueError(
      f"There are {len(groups)} {many} and {len(texts)} {what}s: give one {what}, or one, or a list of them, for each."
    )
  images = [image for group in groups for image in group]
  width, flat, requests = len(groups[0]), [], []
  for number, own in enumerate(asked):
    own = [own] if isinstance(own, str) else list(own)
    flat += own
    requests += [tuple(range(number * width, (number + 1) * width))] * len(own)
  if not flat:
    raise ValueError(f"There is no {what}: the list is empty.")

  def shape(results):
    results = iter(results)
    nested = [
      next(results) if isinstance(own, str) else [next(results) for _ in own] for own in asked
    ]
    return nested[0] if one else nested

  return images, flat, requests, shape


class ImageRows:
  """Prepares images and clips as evaluation does.

  Attributes:
    frames: frames of a clip.
  """

  def __init__(self, size: int, frames: int = 0, sampling: str = "centres"):
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

  def _image(self, image):
    return ops.eval_transform(_decoded(image), self._size)

  def _clip(self, clip):
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
    return np.stack(
      [
        ops.eval_transform(frame, self._size)
        for frame in video.read_clip(clip, self.frames, self._sampling)
      ]
    )

  def _placed(self, image):
    pixels = _decoded(image)
    canvas = box_transforms.fit(pixels, np.zeros((0, 4)), self._size)
    return {
      "image": canvas.image,
      "placed": np.array(canvas.placed, np.int32),
      "size": np.array(pixels.shape[1::-1], np.int32),
    }


def _decoded(image):
  """Decodes an image in any form to u8[H, W, 3], upright. Raises ImageError."""
  if isinstance(image, np.ndarray | Image.Image) and 0 in (
    image.shape if isinstance(image, np.ndarray) else image.size
  ):
    raise ImageError("An image of zero pixels shows nothing.")
  return ops.decode_image(image)


def _in_threads(read, images):
  """[read(image), ...]; decoders work outside of Python's lock."""
  if len(images) == 1:
    return [read(images[0])]
  with ThreadPoolExecutor(min(len(images), os.cpu_count() or 1)) as pool:
    return list(pool.map(read, images))


class TextRows:
  """Texts -> i32[N, L] as evaluation prepares them, but what evaluation cuts in silence is refused, or cut with a warning.

  Args:
    what: "question", "caption", ... tokenizer: see data/tokenizer.py. length: L. max_words: clean as a caption of so many words.
    lower: lower case. ends: rows end with [eos].
  """

  def __init__(self, what, tokenizer, length, max_words=0, lower=False, ends=False):
    self._what, self._tokenizer, self._length, self._max_words, self._lower, self._ends = (
      what,
      tokenizer,
      length,
      max_words,
      lower,
      ends,
    )

  def __call__(self, texts, truncate=False):
    """texts: strings. truncate: cut those that are too long, and warn. Raises TypeError, ValueError: no string, empty, too long."""
    return np.stack([self._row(text, truncate) for text in texts])

  def _row(self, text, truncate):
    if not isinstance(text, str):
      raise TypeError(f"A {self._what} is a string, not {type(text).__name__}.")
    cleaned = self._clean(text)
    ids = self._tokenizer.encode(cleaned)
    if not cleaned.strip() or all(
      i in (self._tokenizer.bos_id, self._tokenizer.eos_id) for i in ids
    ):
      raise ValueError(f"The {self._what} {text!r} is empty: it has no words.")
    if problem := self._too_long(text, ids):
      if not truncate:
        raise ValueError(
          f"The {self._what} {_short(text)} has {problem}; shorten it, or cut it with truncate=True."
        )
      warnings.warn(
        f"The {self._what} {_short(text)} has {problem}; the rest is cut.", stacklevel=2
      )
    return pad_ids(
      [ids],
      self._length,
      self._tokenizer.pad_id,
      truncate=True,
      ensure_eos=self._tokenizer.eos_id if self._ends else None,
    )[0]

  def _clean(self, text):
    if self._max_words:
      return cleaning.pre_caption(text, self._max_words)
    return text.lower() if self._lower else cleaning.vqa_text(text)

  def _too_long(self, text, ids):
    """What of the text the model cannot take, or ""."""
    if (
      self._max_words
      and (words := len(cleaning.pre_caption(text, len(text) + 1).split(" "))) > self._max_words
    ):
      return f"{words} words, more than the {self._max_words} that the model takes"
    tokens = len(ids) + (self._ends and ids[-1] != self._tokenizer.eos_id)
    return (
      f"{tokens} tokens, more than the {self._length} that the model takes"
      if tokens > self._length
      else ""
    )


def _short(text):
  return repr(text if len(text) <= 60 else f"{text[:57]}...")
