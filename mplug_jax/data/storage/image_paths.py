"""Paths of the images that annotations name."""

import pathlib

from mplug_jax.data.storage import archives


class ImagePaths:
  """Turns image names of annotations into paths under a root.

  The root, or the beginning of a name, may be an archive, see archives.py. Only the first few
  images must exist, which reveals a wrong root: a million look-ups on a network disk take minutes.
  Other missing images show when they are read.
  """

  _CHECKED = 3

  def __init__(self):
    self._left = self._CHECKED

  def __call__(self, root: str | None, key: str, image: str, location: str) -> str:
    """Returns the path of an image.

    Args:
      root: folder or archive, the value of data[key]; an absolute `image` needs none.
      key: key of config.data that has the root, for messages.
      image: the name in the annotations.
      location: the entry's location, for messages.

    Raises:
      ValueError: there is no root, or an archive cannot be used.
      FileNotFoundError: one of the first images is missing.
    """
    if not root and not image.startswith("/"):
      raise ValueError(f"{location}: its image {image!r} needs data.{key}, which is not set.")
    path = f"{root}/{image}" if root and not image.startswith("/") else image
    if "//" in path or "./" in path or path[-1:] == "/" or path[-2:] == "/.":
      path = str(pathlib.PurePath(path))  # one name per file; slow, so only where needed
    if self._left > 0:
      self._left -= 1
      try:
        exists = archives.is_file(path)
      except ValueError as error:
        raise ValueError(f"{location}: {error}") from None
      if not exists:
        raise FileNotFoundError(f"{location}: image {path} does not exist; check data.{key}.")
    return path
