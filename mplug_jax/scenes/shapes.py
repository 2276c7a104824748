"""Shapes of the objects: outlines and the pixels they cover."""

import functools

import cv2
import numpy as np


def _outline(shape):
  """Returns the corners f64[N, 2] of a shape in a square of half extent 1, y down."""
  if shape == "square":
    return np.array([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)])
  if shape == "triangle":
    return np.array([(0, -0.95), (1, 0.85), (-1, 0.85)])
  if shape == "diamond":
    return np.array([(0, -1), (0.68, 0), (0, 1), (-0.68, 0)])
  if shape == "cross":
    a = 0.32
    x = [-a, a, a, 1, 1, a, a, -a, -a, -1, -1, -a]
    y = [-1, -1, -a, -a, a, a, 1, 1, a, a, -a, -a]
    return np.stack([x, y], 1)
  if shape == "star":
    turns = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2, 0.46, 1.1)
    return np.stack([reach * np.sin(turns), -reach * np.cos(turns)], 1)
  turns = np.arange(64) * np.pi / 32  # circle
  return np.stack([np.sin(turns), np.cos(turns)], 1)


@functools.lru_cache(maxsize=256)
def object_mask(shape: str, radius: int) -> np.ndarray:
  """Returns the coverage f32[h, w] in [0, 1] of a shape, cropped to the object's box.

  Every edge row and column has a pixel that is covered by half or more.
  """
  over = 8  # supersampling
  side = 2 * radius + 6
  corners = (_outline(shape) * radius + side / 2) * over
  fine = np.zeros((side * over, side * over), np.uint8)
  cv2.fillPoly(fine, [np.rint(corners).astype(np.int32)], 255)
  mask = cv2.resize(fine, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
  rows, columns = (np.flatnonzero(mask.max(axis) >= 0.5) for axis in (1, 0))
  mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy()
  mask.setflags(write=False)
  return mask
