"""Pixels of procedural scenes: a background and the objects in drawing order."""

import cv2
import numpy as np

from mplug_jax.scenes import scene as scenes
from mplug_jax.scenes import shapes


def _texture(rng, size):
  """Draws a pattern f32[size, size, 1] in [-1, 1]: stripes, checks, blobs or a gradient."""
  kind = rng.integers(4)
  if kind == 0:  # blobs: a coarse grid made smooth
    cells = int(rng.integers(4, 13))
    grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return np.clip(cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC), -1, 1)[..., None]
  turn = rng.uniform(0, np.pi)
  axis = np.arange(size, dtype=np.float32) / size - 0.5
  along = np.cos(turn) * axis[None, :] + np.sin(turn) * axis[:, None]
  if kind == 1:
    return (np.clip(1.4 * along, -1, 1))[..., None]
  waves = np.float32(2 * np.pi * rng.uniform(3, 9))
  pattern = np.sin(waves * along)
  if kind == 2:
    return pattern[..., None]
  across = -np.sin(turn) * axis[None, :] + np.cos(turn) * axis[:, None]
  return np.sign(pattern * np.sin(waves * across))[..., None]


def _background(config, rng):
  shape = (config.size, config.size, 3)
  if config.difficulty == "default":
    tint = rng.integers(222, 244, 3, dtype=np.uint8)
    return rng.integers(0, 13, shape, dtype=np.uint8) + (tint - np.uint8(6))
  tint = rng.uniform(155, 210) + rng.uniform(-14, 14, 3)  # near gray: never an object's color
  contrast = rng.uniform(8, 26, 3)
  noise = rng.integers(0, 25, shape, dtype=np.uint8)
  canvas = (tint - 12 + contrast * _texture(rng, config.size)).astype(np.float32) + noise
  return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def render(scene: scenes.Scene, config: scenes.SceneConfig) -> np.ndarray:
  """Returns the RGB pixels u8[size, size, 3] of a scene.

  Raises:
    ValueError: config is not the one of the scene.
  """
  if config != scene.config:
    raise ValueError(
      f"The scene was sampled with {scene.config}, not with {config}; render it with scene.config."
    )
  image = _background(config, scenes.generator(config, scene.split, scene.index, "background"))
  for o in scene.objects:
    x1, y1, x2, y2 = o.box
    patch = image[y1:y2, x1:x2].astype(np.float32)
    patch += shapes.object_mask(o.shape, o.radius)[..., None] * (
      np.array(o.rgb, np.float32) - patch
    )
    image[y1:y2, x1:x2] = np.rint(patch)
  return image
