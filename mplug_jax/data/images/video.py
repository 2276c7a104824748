"""Clips as a few frames: sampled from video files, or from arrays of frames.

The model sees them as images in a row (paper section 4.4).
"""

import contextlib
import importlib.util
import os
from typing import Any

import cv2
import numpy as np
from jaxtyping import Int, UInt8

from mplug_jax.data.errors import ImageError
from mplug_jax.data.storage import archives

SAMPLINGS = ("uniform", "official")


def frame_numbers(
  length: int, count: int, sampling: str = "uniform"
) -> Int[np.ndarray, " {count}"]:
  """Returns the numbers of the sampled frames of a clip, in order.

  Args:
    length: frames of the clip.
    count: frames to sample.
    sampling: "uniform": the middles of `count` equal parts. "official": a step rounded down from
      frame 0 on, so that the end is never sampled, and only frame 0 of clips with fewer frames than
      `count` (docs/official.md item 37). A number: that frame.

  Raises:
    ValueError: an unknown sampling.
  """
  if sampling.isdigit():
    return np.full(count, min(int(sampling), length - 1))
  if sampling not in SAMPLINGS:
    raise ValueError(
      f"config.data.frame_sampling={sampling!r} is neither a frame number nor one of "
      f"{', '.join(SAMPLINGS)}."
    )
  if sampling == "official":
    return np.arange(count) * (length // count)
  return ((np.arange(count) + 0.5) * length / count).astype(np.int64)


def is_clip(image: Any) -> bool:
  """Returns whether an image of a record is an array of frames.

  Args:
    image: image or clip of a record.
  """
  return isinstance(image, np.ndarray) and image.ndim == 4


def read_clip(
  video: Any, count: int, sampling: str = "uniform", name: str | None = None
) -> list[UInt8[np.ndarray, "height width 3"]]:
  """Reads some frames of a clip.

  Args:
    video: path of a video file, also into an archive (see archives.py), or u8[T, H, W, 3].
    count: frames to read.
    sampling: see `frame_numbers`.
    name: name of the clip in messages; default its path.

  Returns:
    `count` RGB frames.

  Raises:
    ImageError: the file cannot be opened, or no frame can be decoded.
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
  """Returns the path of a local file that exists until `stack` ends. Raises ImageError."""
  try:
    if archives.is_file(path):
      return stack.enter_context(archives.local_file(path))
  except (ValueError, OSError) as error:  # raised by the archive
    raise ImageError(f"Video {name} cannot be read: {str(error).rstrip('.')}.") from error
  raise ImageError(f"Video {name} does not exist.")


def _read_with_opencv(path, count, sampling):
  """Decodes from the start, because seeking is not exact.

  Decodes twice if the header gives a wrong number of frames. Returns None if there is no frame.
  """
  # Read by OpenCV when it opens the first video. The caller reports unreadable files once.
  os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
  with contextlib.closing(_Capture(path)) as capture:
    length = capture.length
  for _ in range(2):
    with contextlib.closing(_Capture(path)) as capture:
      length = length or capture.count()
      if not length:
        return None
    wanted = frame_numbers(length, count, sampling)
    frames = {}
    with contextlib.closing(_Capture(path)) as capture:
      for number in range(int(wanted.max()) + 1):
        frame = capture.next(number in wanted)
        if frame is None:
          break
        frames[number] = frame
    if all(number in frames for number in wanted):
      return [frames[number] for number in wanted]
    length = max(frames) + 1 if frames else 0
  return None


class _Capture:
  """A video file read frame by frame."""

  def __init__(self, path):
    self._capture = cv2.VideoCapture(path)
    self.length = 0
    if self._capture.isOpened():
      self.length = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

  def count(self):
    """Returns the number of remaining frames, and skips them."""
    number = 0
    while self._capture.grab():
      number += 1
    return number

  def next(self, decode):
    """Returns the next frame u8[H, W, 3]; () without `decode`; None at the end."""
    if not self._capture.grab():
      return None
    if not decode:
      return ()
    decoded, frame = self._capture.retrieve()
    return np.ascontiguousarray(frame[..., ::-1]) if decoded else None

  def close(self):
    """Closes the file."""
    self._capture.release()


def _read_with_pyav(path, count, sampling):
  """Decodes with PyAV, for codecs that OpenCV lacks. Returns None if there is no frame."""
  import av  # pyright: ignore[reportMissingImports] (optional)

  try:
    with av.open(path) as container:
      length = sum(1 for _ in container.decode(video=0))
    if not length:
      return None
    wanted = frame_numbers(length, count, sampling)
    frames = {}
    with av.open(path) as container:
      for number, frame in enumerate(container.decode(video=0)):
        if number in wanted:
          frames[number] = frame.to_ndarray(format="rgb24")
    return [frames[number] for number in wanted]
  except (av.error.FFmpegError, IndexError):
    return None


def contact_image(
  video: Any, count: int = 9, sampling: str = "uniform"
) -> UInt8[np.ndarray, "height width 3"]:
  """Returns frames of a clip in a square of k by k, u8[k H, k W, 3].

  Args:
    video: as `read_clip` takes it.
    count: number of frames.
    sampling: see `frame_numbers`.

  Raises:
    ImageError: as `read_clip`.
  """
  frames = read_clip(video, count, sampling)
  side = int(np.ceil(np.sqrt(count)))
  frames += [np.full_like(frames[0], 255)] * (side * side - count)
  return np.concatenate(
    [np.concatenate(frames[i : i + side], axis=1) for i in range(0, side * side, side)]
  )


def write_mp4(
  path: str | os.PathLike[str], frames: UInt8[np.ndarray, "time height width 3"], fps: int = 8
) -> None:
  """Writes a clip as MPEG-4.

  Args:
    path: the file.
    frames: RGB frames of even height and width.
    fps: frames per second.

  Raises:
    OSError: OpenCV cannot write such a video.
  """
  height, width = frames.shape[1:3]
  codec = cv2.VideoWriter.fourcc(*"mp4v")
  writer = cv2.VideoWriter(os.fspath(path), codec, fps, (width, height))
  if not writer.isOpened():
    raise OSError(f"{path}: OpenCV cannot write a video of {width} x {height} pixels here.")
  for frame in frames:
    writer.write(np.ascontiguousarray(frame[..., ::-1]))
  writer.release()
