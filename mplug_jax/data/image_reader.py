"""Images of examples: read, augmented or resized, with those that cannot be read counted instead of fatal."""

import os

from absl import logging
import numpy as np

from mplug_jax.data import image_ops

_WARNINGS = 10


class ImageReader:
  """Any image -> u8[S, S, 3], not normalised.

  Args:
    size: S, pixels.
    augment: arguments of `image_ops.train_transform`, for calls with an rng; None: the evaluation transform always.
    strict: raise ImageError for an image that cannot be read. Otherwise it is black, the first ten are named in the log,
      and the caller takes care that its row carries no weight.
    blank: every image is black, to measure what the texts alone give away.
  """

  def __init__(self, size, augment=None, strict=False, blank=False):
    self._size, self._strict, self._blank = size, strict, blank
    self._augment = None if augment is None else dict(augment)
    self._unreadable = set()  # names, as many as are warned about

  def __call__(self, image, name, rng=None):
    """Reads one image.

    Args:
      image: see `image_ops.decode_image`. name: what messages call it when it is no path. rng: for augmentation; None in evaluation.

    Returns:
      (u8[S, S, 3], whether it could not be read).
    """
    black = np.zeros((self._size, self._size, 3), np.uint8)
    if self._blank:
      return black, False
    try:
      image = image_ops.decode_image(image, None if isinstance(image, str | os.PathLike) else str(name))
    except image_ops.ImageError as error:
      if self._strict:
        raise
      if len(self._unreadable) < _WARNINGS and name not in self._unreadable:
        self._unreadable.add(name)
        logging.warning("%s Its texts do not count.", error)
      return black, True
    if self._augment is None or rng is None:
      return image_ops.eval_transform(image, self._size), False
    return image_ops.train_transform(image, self._size, rng, **self._augment), False


def reader(config):
  """The ImageReader that config.data and config.model describe; data.augment has scale, flip and randaugment."""
  augment = config.data.augment
  augment = dict(scale=augment.scale, flip=augment.flip, randaugment=augment.randaugment or None)
  return ImageReader(config.model.image_size, augment, config.data.strict, config.data.blank_image)
