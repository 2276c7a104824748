"""Reads input rows of the predict command in a thread, ahead of the model."""

import os

from mplug_jax.data.images import ops
from mplug_jax.inference.inputs import is_clip


class Reader:
  """Rows -> (images, texts, {row number: why it has no result}) of a batch; images decoded, each once.

  Args:
    check: function (text), which raises ValueError for one that the model cannot take; None: there are no texts.
    size: images are resized to so many pixels at once, which takes less memory; 0: they are not.
  """

  def __init__(self, kind, options, check, size):
    self._kind, self._text, self._check, self._size = kind, options.text, check, size
    self._folder = os.path.dirname(options.input) if options.input else ""

  def __call__(self, rows):
    decoded, images, texts, errors = {}, [], [], {}
    for number, row in enumerate(rows):
      image, text = (
        row.get(self._kind.image),
        row.get(self._kind.text, self._text) if self._kind.text else None,
      )
      if self._kind.method == "embed" and image is not None:
        text = None  # the row's features are the image's
      try:
        if self._check and (self._kind.method != "embed" or image is None):
          for each in text if isinstance(text, list) and self._kind.method == "match" else [text]:
            self._check(each)
        if self._kind.method != "embed" or image is not None:
          image = (
            tuple(self._read(one, decoded) for one in image)
            if self._kind.image == "images"
            else self._read(image, decoded)
          )
      except (ValueError, TypeError) as error:
        errors[number] = str(error)
      images.append(image)
      texts.append(text)
    return images, texts, errors

  def _read(self, image, decoded):
    """A name -> pixels; of a video its path. An image that cannot be read is an ImageError every time."""
    if not isinstance(image, str):
      raise ValueError(f"{self._kind.image} is {image!r} and no name of a file.")
    path = os.path.join(self._folder, image)
    if is_clip(path):
      return path  # whether it can be read shows later
    if path not in decoded:
      try:
        pixels = ops.decode_image(path)
        decoded[path] = ops.eval_transform(pixels, self._size) if self._size else pixels
      except ops.ImageError as error:
        decoded[path] = error
    if isinstance(decoded[path], ops.ImageError):
      raise decoded[path]
    return decoded[path]
