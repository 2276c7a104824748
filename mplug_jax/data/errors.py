"""Exceptions of the data packages."""


class ImageError(ValueError):
  """Raised for an image that cannot be read: missing, truncated, corrupt, too large, no image."""
