"""Images and clips of examples: read, augmented or resized, with those that cannot be read counted instead of fatal."""

import os

import numpy as np
from absl import logging

from mplug_jax.data.errors import ImageError
from mplug_jax.data.images import ops, video

_WARNINGS = 10


class ImageReader:
  """Any image -> u8[S, S, 3], or any clip -> u8[F, S, S, 3], not normalised.

  Args:
    size: S, pixels.
    augment: arguments of `image_ops.train_transform`, for calls with an rng; None: the evaluation
      transform always.
    strict: raise ImageError for an image that cannot be read. Otherwise it is black, the first ten
      are named in the log, and the caller takes care that its row carries no weight.
    blank: every image is black, to measure what the texts alone give away.
    frames: F, to read clips; 0 for images. sampling: see `video.frame_numbers`.
  """

  def __init__(self, size, augment=None, strict=False, blank=False, frames=0, sampling="uniform"):
    self._size, self._strict, self._blank, self._frames, self._sampling = (
      size,
      strict,
      blank,
      frames,
      sampling,
    )
    self._augment = None if augment is None else dict(augment)
    self._unreadable = set()  # names, as many as are warned about

  def __call__(self, image, name, rng=None):
    """Reads one image or clip.

    Args:
      image: see `image_ops.decode_image`, or `video.read_clip`. name: what messages call it when it
        is no path.
      rng: for augmentation, the same for all frames of a clip; None in evaluation.

    Returns:
      (u8[S, S, 3] or u8[F, S, S, 3], whether it could not be read).
    """
    black = np.zeros((self._frames,) * bool(self._frames) + (self._size, self._size, 3), np.uint8)
    if self._blank:
      return black, False
    try:
      return self._read(
        image, None if isinstance(image, str | os.PathLike) else str(name), rng
      ), False
    except ImageError as error:
      if self._strict:
        raise
      if len(self._unreadable) < _WARNINGS and name not in self._unreadable:
        self._unreadable.add(name)
        logging.warning("%s Its texts do not count.", error)
      return black, True

  def _read(self, image, name, rng):
    if not self._frames:
      return self._transform(ops.decode_image(image, name), rng)
    seed = None if rng is None else int(rng.integers(1 << 63))
    return np.stack(
      [
        self._transform(frame, None if seed is None else np.random.default_rng(seed))
        for frame in video.read_clip(image, self._frames, self._sampling, name)
      ]
    )

  def _transform(self, image, rng):
    if self._augment is None or rng is None:
      return ops.eval_transform(image, self._size)
    return ops.train_transform(image, self._size, rng, **self._augment)


def reader(config):
  """The ImageReader that config.data and config.model describe.

  Data.augment has what image_ops.train_transform takes.
  """
  data, augment = config.data, config.data.augment
  augment = dict(
    scale=augment.scale,
    flip=augment.flip,
    randaugment=augment.randaugment or None,
    sharpness_wraps=augment.sharpness_wraps,
  )
  return ImageReader(
    config.model.image_size,
    augment,
    data.strict,
    data.black_images,
    data.frames,
    data.frame_sampling,
  )
