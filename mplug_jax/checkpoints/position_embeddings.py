"""Resizes position tables of the image encoder, with the bits of PyTorch's interpolation on CPU."""

import math

import numpy as np
from jaxtyping import Float, Int

LEAF = "visual_encoder/position_embedding"  # path of the table in the parameters


def resize_positions(
  table: Float[np.ndarray, "old_tokens width"], tokens: int
) -> Float[np.ndarray, "tokens width"]:
  """Resizes the grid of a position table bilinearly; the class token's row is kept.

  Half-pixel centers, clamped at the border, no antialiasing, as in the official loaders
  (docs/official.md item 60). A table of the right size is returned unchanged.

  Args:
    table: f[1 + a * a, W].
    tokens: rows of the result, 1 + b * b.

  Returns:
    f32[tokens, W].

  Raises:
    ValueError: one of the two grids is not square.
  """
  old, new = (math.isqrt(rows - 1) for rows in (len(table), tokens))
  if old * old != len(table) - 1 or new * new != tokens - 1:
    raise ValueError(
      f"A position table of {len(table)} rows cannot become one of {tokens}: both must be 1 + a "
      "square number."
    )
  if old == new:
    return table
  low, high, weight = _neighbors(old, new)
  grid = np.asarray(table[1:], np.float32).reshape(old, old, -1)

  def term(rows, columns, row_weight, column_weight):
    """Returns the share of one of four neighbors, f64[new, new, W], where it is exact."""
    weights = (row_weight[:, None] * column_weight[None, :]).astype(np.float32)[..., None]
    return weights.astype(np.float64) * grid[rows][:, columns]

  near = np.float32(1.0) - weight
  # PyTorch's order and roundings: one product, then three fused multiply-adds.
  total = term(high, low, weight, near).astype(np.float32)
  for rows, columns, row_weight, column_weight in (
    (high, high, weight, weight),
    (low, high, near, weight),
    (low, low, near, near),
  ):
    total = (term(rows, columns, row_weight, column_weight) + total).astype(np.float32)
  return np.concatenate([np.asarray(table[:1], np.float32), total.reshape(new * new, -1)])


def _neighbors(
  old: int, new: int
) -> tuple[Int[np.ndarray, "new"], Int[np.ndarray, "new"], Float[np.ndarray, "new"]]:
  """Returns the two old positions around each new one, and the weight of the second."""
  scale = np.float32(old) / np.float32(new)
  center = (np.arange(new, dtype=np.float32) + np.float32(0.5)).astype(np.float64)
  source = np.maximum((center * np.float64(scale) - 0.5).astype(np.float32), np.float32(0.0))
  low = source.astype(np.int64)
  return low, np.minimum(low + 1, old - 1), source - low.astype(np.float32)
