"""Clips as a few frames: sampled from video files, or from arrays of frames.

The model sees them as images in a row (paper section 4.4).
"""

import contextlib
import importlib.util
import os

import cv2
import numpy as np

from mplug_jax.data.errors import ImageError
from mplug_jax.data.storage import archives

SAMPLINGS = ("uniform", "official")


def frame_numbers(length, count, sampling="uniform"):
  """Which `count` frames of `length` to look at, i64[count] in order.

  Args:
    sampling: "uniform": the middles of `count` equal parts. "official": a step rounded down from
      frame 0 on, so that the end is never seen, and frame 0 alone of clips with fewer frames than
      `count` (docs/official.md item 37). A number: that frame.

  Raises:
    ValueError: an unknown sampling.
  """
  if sampling.isdigit():
    return np.full(count, min(int(sampling), length - 1))
  if sampling not in SAMPLINGS:
    raise ValueError(
      f"config.data.frame_sampling={sampling!r} is not a frame number and none of "
      f"{', '.join(SAMPLINGS)}."
    )
  if sampling == "official":
    return np.arange(count) * (length // count)
  return ((np.arange(count) + 0.5) * length / count).astype(np.int64)


def is_clip(image):
  """Whether an image of a record is an array of frames."""
  return isinstance(image, np.ndarray) and image.ndim == 4


def read_clip(video, count, sampling="uniform", name=None):
  """Frames of a clip.

  Args:
    video: path of a video file, which may lie in an archive (see archives.py), or u8[T, H, W, 3].
    count, sampling: see `frame_numbers`.
    name: what messages call it; default its path.

  Returns:
    list of `count` u8[H, W, 3], RGB.

  Raises:
    ImageError: it cannot be opened or has no frame that can be decoded.
  """
  if is_clip(video):
    return list(video[frame_numbers(len(video), count, sampling)])
  path = os.fspath(video)
  name = name or path
  with contextlib.ExitStack() as stack:
    local = _local_file(path, name, stack)
    read = _read_with_opencv(local, count, sampling)
    if read is None and importlib.util.find_spec("av"):
      read = _read_with_pyav(local, count, sampling)
  if read is None:
    raise ImageError(f"Video {name} cannot be read: no frame can be decoded.")
  return read


def _local_file(path, name, stack):
  """The path of a file that decoders can open, until `stack` ends. Raises ImageError."""
  try:
    if archives.is_file(path):
      return stack.enter_context(archives.local_file(path))
  except (ValueError, OSError) as error:  # of the archive
    raise ImageError(f"Video {name} cannot be read: {str(error).rstrip('.')}.") from error
  raise ImageError(f"Video {name} does not exist.")


def _read_with_opencv(path, count, sampling):
  """Decodes from the start, for seeking is not exact.

  Twice when the file says a wrong number of frames. None: no frame.
  """
  # OpenCV reads it when it opens the first video. The caller reports unreadable files, once.
  os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
  with contextlib.closing(_Capture(path)) as capture:
    length = capture.length
  for _ in range(2):
    with contextlib.closing(_Capture(path)) as capture:
      length = length or capture.count()
      if not length:
        return None
    wanted, found = frame_numbers(length, count, sampling), {}
    with contextlib.closing(_Capture(path)) as capture:
      for number in range(int(wanted.max()) + 1):
        frame = capture.next(number in wanted)
        if frame is None:
          break
        found[number] = frame
    if all(number in found for number in wanted):
      return [found[number] for number in wanted]
    length = len(found) and max(found) + 1
  return None


class _Capture:
  """A video file read frame by frame."""

  def __init__(self, path):
    self._capture = cv2.VideoCapture(path)
    self.length = (
      max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))) if self._capture.isOpened() else 0
    )

  def count(self):
    """Frames that are left."""
    number = 0
    while self._capture.grab():
      number += 1
    return number

  def next(self, decode):
    """The next frame u8[H, W, 3]; without `decode` an empty stand-in; None at the end."""
    if not self._capture.grab():
      return None
    if not decode:
      return ()
    there, frame = self._capture.retrieve()
    return np.ascontiguousarray(frame[..., ::-1]) if there else None

  def close(self):
    self._capture.release()


def _read_with_pyav(path, count, sampling):
  """As OpenCV, for codecs that it lacks. None: no frame."""
  import av

  try:
    with av.open(path) as container:
      length = sum(1 for _ in container.decode(video=0))
    if not length:
      return None
    wanted, found = frame_numbers(length, count, sampling), {}
    with av.open(path) as container:
      for number, frame in enumerate(container.decode(video=0)):
        if number in wanted:
          found[number] = frame.to_ndarray(format="rgb24")
    return [found[number] for number in wanted]
  except (av.error.FFmpegError, IndexError):
    return None


def contact_image(video, count=9, sampling="uniform"):
  """Frames of a clip side by side in a square, u8[k H, k W, 3], for people to look at."""
  frames, side = read_clip(video, count, sampling), int(np.ceil(np.sqrt(count)))
  frames += [np.full_like(frames[0], 255)] * (side * side - count)
  return np.concatenate(
    [np.concatenate(frames[i : i + side], axis=1) for i in range(0, side * side, side)]
  )


def write_mp4(path, frames, fps=8):
  """Writes u8[T, H, W, 3] as MPEG-4, H and W even. Raises OSError when OpenCV cannot."""
  writer = cv2.VideoWriter(
    os.fspath(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, frames.shape[2:0:-1]
  )
  if not writer.isOpened():
    raise OSError(
      f"{path}: OpenCV cannot write a video of {frames.shape[2]} x {frames.shape[1]} pixels here."
    )
  for frame in frames:
    writer.write(np.ascontiguousarray(frame[..., ::-1]))
  writer.release()
