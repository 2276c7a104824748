"""Exceptions of the data packages."""


class ImageError(ValueError):
  """An image that cannot be read: missing, truncated, corrupt, too large or not an image."""
