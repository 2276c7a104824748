"""Recall at 1, 5 and 10 in both directions of image-text retrieval, and what chance gives. Pure numpy.

"txt" stands for the texts found for an image, "img" for the images found for a text, as in the published tables.
"""

import numpy as np

DEPTHS = (1, 5, 10)


def ranks(scores, correct):
  """Rank, from 0, of the best correct column of each row: how many wrong ones score as high or higher.

  Ties count against the row, so that constant scores give no recall; the official order of equal scores is chance.

  Args:
    scores: f[R, C]. correct: bool[R, C].

  Returns:
    f64[R]; inf where no column is correct.
  """
  best = np.where(correct, scores, -np.inf).max(1, keepdims=True)
  return np.where(correct.any(1), (~correct & (scores >= best)).sum(1), np.inf)


def recalls(text_ranks, image_ranks):
  """Ranks of every image's texts f[N] and of every text's image f[T] -> {"txt_r1": percent, ..., "img_r_mean", "r_mean"}.

  A direction's mean is that of its three recalls, `r_mean` that of both directions.
  """
  out = {}
  for side, values in (("txt", text_ranks), ("img", image_ranks)):
    out |= {f"{side}_r{depth}": 100 * float(np.mean(values < depth)) for depth in DEPTHS}
    out[f"{side}_r_mean"] = float(np.mean([out[f"{side}_r{depth}"] for depth in DEPTHS]))
  return out | {"r_mean": (out["txt_r_mean"] + out["img_r_mean"]) / 2}


def chance(owner, images):
  """Expected r_mean, in percent, of a random order. owner: i[T], the image of each text; images: their number."""
  own = np.bincount(owner, minlength=images)[:, None]
  found = []
  for depth in DEPTHS:
    drawn = np.arange(depth)
    # Each further text is wrong if it is one of those wrong ones that are left.
    wrong = np.clip((len(owner) - own - drawn) / np.maximum(len(owner) - drawn, 1), 0, 1).prod(1)
    found += [np.mean(1 - wrong), min(depth / images, 1.0)]
  return 100 * float(np.mean(found))
