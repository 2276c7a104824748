"""Checks of the arguments of Predictor's methods. No JAX."""

from collections.abc import Iterable, Sequence
from typing import Any

from mplug_jax.inference import inputs


def text_list(texts: str | Iterable[str]) -> list[str]:
  """Returns one or many texts as a list. Raises ValueError: the list is empty."""
  listed = [texts] if isinstance(texts, str) else list(texts)
  if not listed:
    raise ValueError("The list of texts is empty.")
  return listed


def candidate_answers(texts: Sequence[str]) -> tuple[str, ...]:
  """Returns the answers to choose from. Raises ValueError: not a list of non-empty strings."""
  if (
    isinstance(texts, str)
    or not all(isinstance(text, str) and text.strip() for text in texts)
    or not texts
  ):
    raise ValueError("candidates must be a list of non-empty answers.")
  return tuple(texts)


def refuse_clips(images: Iterable[Any], method: str) -> None:
  """Raises ValueError if there is a clip among the images of a method."""
  if any(inputs.is_clip(image) for image in images):
    raise ValueError(f"{method} takes images, not clips.")
