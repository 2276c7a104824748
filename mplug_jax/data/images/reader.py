"""Reads the images and clips of examples; unreadable ones are counted instead of fatal."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from mplug_jax.config import Config
from mplug_jax.data.errors import BadRecords, ImageError
from mplug_jax.data.images import ops, video


class ImageReader:
  """Function from an image to u8[S, S, 3], or from a clip to u8[F, S, S, 3], not normalized."""

  def __init__(
    self,
    size: int,
    augment: Mapping[str, Any] | None = None,
    strict: bool = False,
    blank: bool = False,
    frames: int = 0,
    sampling: str = "uniform",
  ):
    """Makes the function.

    Args:
      size: S, pixels.
      augment: arguments of `ops.train_transform`, for calls with a generator; None: the evaluation
        transform always.
      strict: raises ImageError for an unreadable image. Otherwise the image is black, the first ten
        are named in the log, and the caller gives its row no weight.
      blank: every image is black, to measure how much the texts alone reveal.
      frames: F, frames of a clip; 0 for images.
      sampling: see `video.frame_numbers`.
    """
    self._size = size
    self._bad = BadRecords(strict, "Its texts do not count.")
    self._blank = blank
    self._frames = frames
    self._sampling = sampling
    self._augment = None if augment is None else dict(augment)

  def __call__(
    self, image: Any, name: Any, rng: np.random.Generator | None = None
  ) -> tuple[UInt8[np.ndarray, "*shape"], bool]:
    """Reads one image or clip.

    Args:
      image: as `ops.decode_image` or `video.read_clip` take it.
      name: name of an image without a path, for messages.
      rng: for augmentation, the same for all frames of a clip; None in evaluation.

    Returns:
      (u8[S, S, 3] or u8[F, S, S, 3], True if the image is unreadable).
    """
    shape = (self._size, self._size, 3)
    black = np.zeros((self._frames, *shape) if self._frames else shape, np.uint8)
    if self._blank:
      return black, False
    shown_name = None if isinstance(image, str | os.PathLike) else str(name)
    try:
      return self._read(image, shown_name, rng), False
    except ImageError as error:
      self._bad.add(error)
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


def reader(config: Config) -> ImageReader:
  """Returns the ImageReader that config.data and config.model describe.

  Args:
    config: config of the run; data.augment has the arguments of `ops.train_transform`.
  """
  data = config.data
  augment = config.data.augment
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
