"""Recall at 1, 5 and 10 in both directions of image-text retrieval, and its chance level.

As in published tables, "txt" is retrieval of texts for an image, "img" of images for a text.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

DEPTHS = (1, 5, 10)


def ranks(
  scores: Float[np.ndarray, "rows columns"], correct: Bool[np.ndarray, "rows columns"]
) -> Float[np.ndarray, " rows"]:
  """Returns the rank, from 0, of the best correct column of each row.

  The rank is the number of wrong columns with the same or a higher score: ties count as errors, so
  that constant scores give no recall. The official code orders equal scores arbitrarily.

  Args:
    scores: score of each column.
    correct: True for correct columns.

  Returns:
    Ranks, f64; inf if no column is correct.
  """
  best = np.where(correct, scores, -np.inf).max(1, keepdims=True)
  return np.where(correct.any(1), (~correct & (scores >= best)).sum(1), np.inf)


def recalls(
  text_ranks: Float[np.ndarray, " images"], image_ranks: Float[np.ndarray, " texts"]
) -> dict[str, float]:
  """Returns the recalls in percent.

  Args:
    text_ranks: rank of the best correct text of each image.
    image_ranks: rank of the image of each text.

  Returns:
    {"txt_r1", ..., "img_r_mean", "r_mean"}: recall at each depth, the mean of each direction over
    the depths, and the mean of both directions.

  Raises:
    ValueError: a direction has no query.
  """
  if not len(text_ranks) or not len(image_ranks):
    raise ValueError(
      f"recalls: {len(text_ranks)} images and {len(image_ranks)} texts; without queries in both "
      "directions there is no recall."
    )
  out: dict[str, float] = {}
  for side, values in (("txt", text_ranks), ("img", image_ranks)):
    out |= {f"{side}_r{depth}": 100 * float(np.mean(values < depth)) for depth in DEPTHS}
    out[f"{side}_r_mean"] = float(np.mean([out[f"{side}_r{depth}"] for depth in DEPTHS]))
  return out | {"r_mean": (out["txt_r_mean"] + out["img_r_mean"]) / 2}


def chance(owner: Int[np.ndarray, " texts"], images: int) -> float:
  """Returns the expected r_mean of a random order, in percent.

  Args:
    owner: number of the image of each text; an image without texts is no query.
    images: number of images.
  """
  counts = np.bincount(owner, minlength=images)
  texts_per_image = counts[counts > 0, None]
  probabilities = []
  for depth in DEPTHS:
    drawn = np.arange(depth)
    # Probability that each further text is one of the remaining wrong ones.
    remaining = len(owner) - texts_per_image - drawn
    wrong = np.clip(remaining / np.maximum(len(owner) - drawn, 1), 0, 1).prod(1)
    probabilities += [np.mean(1 - wrong), min(depth / images, 1.0)]
  return 100 * float(np.mean(probabilities))
