"""Shapes of saved and wanted arrays, and their comparison."""

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from mplug_jax.checkpoints.names import grouped
from mplug_jax.parallel.rules import path_name


class Mismatch(ValueError):
  """The checkpoint is complete, but of another model or optimizer."""


def tree_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Returns {"params/temp/value": shape as stored}; a random key is stored as its integers.

  Args:
    tree: pytree of arrays or of objects with `shape` and `dtype`.
  """
  shapes = {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
      leaf = jax.eval_shape(jax.random.key_data, leaf)
    shapes[path_name(path)] = tuple(leaf.shape)
  return shapes


def _read_tree(state_dir: str) -> Any:
  return ocp.PyTreeCheckpointHandler().metadata(epath.Path(state_dir)).tree


@functools.lru_cache(maxsize=4)
def _kept_tree(state_dir: str, manifest: bytes) -> Any:
  """Returns `_read_tree(state_dir)`; the manifest is there to tell saves apart."""
  del manifest
  return _read_tree(state_dir)


def saved_tree(state_dir: epath.Path) -> Any:
  """Returns the tree of what Orbax saved in a folder: objects with `shape` and `dtype`.

  Orbax opens every array for it, 1 to 2 ms each, so the last trees are kept. The manifest of the
  array store differs with every save, so a folder that is written again is read again.

  Args:
    state_dir: item `state` of a checkpoint.
  """
  manifest = state_dir / "manifest.ocdbt"
  # Without one, Orbax was told to write a folder for each array.
  if not manifest.exists():
    return _read_tree(str(state_dir))
  return _kept_tree(str(state_dir), manifest.read_bytes())


def saved_shapes(state_dir: epath.Path) -> dict[str, tuple[int, ...]]:
  """Returns {"params/temp/value": shape} of the arrays that Orbax saved in a folder.

  Args:
    state_dir: item `state` of a checkpoint.
  """
  return tree_shapes(saved_tree(state_dir))


def check_shapes(
  wanted: Mapping[str, tuple[int, ...]],
  saved: Mapping[str, tuple[int, ...]],
  title: str | os.PathLike[str],
) -> None:
  """Checks that a checkpoint has the wanted leaves with the wanted shapes, and no others.

  Args:
    wanted: {leaf: shape} of the configuration.
    saved: {leaf: shape} of the checkpoint.
    title: subject of the message, such as the checkpoint's path.

  Raises:
    Mismatch: they differ; counted by group.
  """
  differences = []
  if missing := wanted.keys() - saved.keys():
    differences.append(f"{len(missing)} missing in the checkpoint: {grouped(missing)}")
  if unexpected := saved.keys() - wanted.keys():
    differences.append(f"{len(unexpected)} in the checkpoint alone: {grouped(unexpected)}")
  common = sorted(wanted.keys() & saved.keys())
  if other := [path for path in common if saved[path] != wanted[path]]:
    shapes = [f"{p} {saved[p]} in the checkpoint, {wanted[p]} wanted" for p in other[:5]]
    differences.append(f"{len(other)} of another shape: {', '.join(shapes)}")
  if differences:
    raise Mismatch(
      f"{title} does not fit this configuration (model, optimizer or EMA differ). "
      f"{'; '.join(differences)}."
    )
