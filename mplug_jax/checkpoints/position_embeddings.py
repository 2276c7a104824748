"""Position tables of the image encoder at another resolution, bit for bit as PyTorch's bilinear interpolation on CPU."""

import math

import numpy as np

LEAF = "visual_encoder/position_embedding"  # path of the table among our parameters


def resize_positions(table, tokens):
  """f[1 + a * a, W] -> f32[tokens, W], tokens = 1 + b * b: the class token's row stays, the grid of a x a becomes b x b.

  Bilinear with half-pixel centres, clamped at the border, no antialiasing (docs/official.md item
  60): what the official loaders do. A table of the right size comes back as it is.

  Raises:
    ValueError: one of the two grids is not square.
  """
  old, new = (math.isqrt(rows - 1) for rows in (len(table), tokens))
  if old * old != len(table) - 1 or new * new != tokens - 1:
    raise ValueError(
      f"A position table of {len(table)} rows cannot become one of {tokens}: both must be 1 + a "
      f"square number."
    )
  if old == new:
    return table
  low, high, weight = _neighbours(old, new)
  grid = np.asarray(table[1:], np.float32).reshape(old, old, -1)

  def term(rows, columns, row_weight, column_weight):
    """One of the four neighbours, f64[new, new, W], exact: the product of two float32 numbers fits in float64."""
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


def _neighbours(old, new):
  """For each of `new` positions: the two of `old` around it, i64[new] each, and the weight of the second, f32[new]."""
  scale = np.float32(old) / np.float32(new)
  centre = (np.arange(new, dtype=np.float32) + np.float32(0.5)).astype(np.float64)
  source = np.maximum((centre * np.float64(scale) - 0.5).astype(np.float32), np.float32(0.0))
  low = source.astype(np.int64)
  return low, np.minimum(low + 1, old - 1), source - low.astype(np.float32)
