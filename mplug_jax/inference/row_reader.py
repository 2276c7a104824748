"""Reads input rows of the predict command in a thread, ahead of the model."""

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from mplug_jax.data.errors import ImageError
from mplug_jax.data.images import ops
from mplug_jax.data.text import unicode
from mplug_jax.inference.inputs import is_clip
from mplug_jax.inference.methods import Command


class Reader:
  """Decodes the images and checks the texts of a batch of rows; every image is decoded once."""

  def __init__(
    self, command: Command, options: Namespace, check: Callable[[Any], Any] | None, size: int
  ):
    """Creates a reader.

    Args:
      command: the method's use by the predict command.
      options: of the command line.
      check: function (text), which raises ValueError if the model cannot take it; None: no texts.
      size: images are resized to so many pixels, which saves memory; 0: they are not.
    """
    self._command = command
    self._text = options.text
    self._check = check
    self._size = size
    self._folder = os.path.dirname(options.input) if options.input else ""

  def __call__(self, rows: Sequence[dict[str, Any]]) -> tuple[list, list, dict[int, str]]:
    """Returns images, texts, and {row number: why it has no result}."""
    decoded: dict[str, Any] = {}
    images = []
    texts = []
    errors = {}
    for number, row in enumerate(rows):
      image = row.get(self._command.image)
      text = row.get(self._command.text, self._text) if self._command.text else None
      if self._command.either and image is not None:
        text = None  # the row's features are the image's
      try:
        self._check_texts(text, image)
        image = self._images(image, decoded)
      except (ValueError, TypeError) as error:
        errors[number] = str(error)
      images.append(image)
      texts.append(text)
    return images, texts, errors

  def _check_texts(self, text: Any, image: Any) -> None:
    if self._check is None or (self._command.either and image is not None):
      return
    several = self._command.text_lists and isinstance(text, list)
    if several and not text:
      raise ValueError(f"{self._command.text} is an empty list.")
    for one in text if several else [text]:
      if isinstance(one, str) and unicode.invalid_unicode(one):
        raise ValueError(f"{self._command.text} is {one!r}, which is {unicode.problem(one)}.")
      self._check(one)

  def _images(self, image: Any, decoded: dict[str, Any]) -> Any:
    """Returns the decoded image or images of a row; None if its text is enough."""
    if self._command.either and image is None:
      return None
    if self._command.image == "images":
      return tuple(self._read(one, decoded) for one in image)
    return self._read(image, decoded)

  def _read(self, image: Any, decoded: dict[str, Any]) -> Any:
    """Returns the pixels of an image file, or the path of a video.

    Raises:
      ImageError: the image cannot be read; again for every row with it.
    """
    if not isinstance(image, str):
      raise ValueError(f"{self._command.image} is {image!r}, not a file name.")
    if "\0" in image:
      raise ValueError(f"{self._command.image} is {image!r}, which cannot be a file name.")
    path = os.path.join(self._folder, image)
    try:
      os.fsencode(path)
    except UnicodeEncodeError:
      raise ValueError(
        f"{self._command.image} is {image!r}, which cannot be a file name."
      ) from None
    if is_clip(path):
      return path  # decoded by the Predictor
    if path not in decoded:
      try:
        pixels = ops.decode_image(path)
        decoded[path] = ops.eval_transform(pixels, self._size) if self._size else pixels
      except ImageError as error:
        decoded[path] = error
    if isinstance(decoded[path], ImageError):
      raise decoded[path]
    return decoded[path]
