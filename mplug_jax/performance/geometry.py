"""Sizes that benchmarks and plans derive from a model's geometry."""

from typing import Any


def image_tokens(model: Any) -> int:
  """Returns the number of image tokens: patches and the class token.

  Args:
    model: MPlug or config.model, with image_size and patch_size in pixels.
  """
  return (model.image_size // model.patch_size) ** 2 + 1
