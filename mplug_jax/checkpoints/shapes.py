"""Shapes of saved and wanted arrays, and their comparison."""

import jax
import orbax.checkpoint as ocp
from etils import epath

from mplug_jax.checkpoints.names import grouped


class Mismatch(ValueError):
  """The checkpoint is whole, but of another model or optimizer."""


def tree_shapes(tree) -> dict[str, tuple[int, ...]]:
  """{"params/temp/value": shape as stored}; a typed random key is stored as its integers."""
  shapes = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
      leaf = jax.eval_shape(jax.random.key_data, leaf)
    shapes[jax.tree_util.keystr(path, simple=True, separator="/")] = tuple(leaf.shape)
  return shapes


def saved_shapes(state_dir: epath.Path) -> dict[str, tuple[int, ...]]:
  return tree_shapes(ocp.PyTreeCheckpointHandler().metadata(state_dir).tree)


def check_shapes(wanted: dict, saved: dict, where) -> None:
  """Raises Mismatch unless both hold the same leaves with the same shapes."""
  found = []
  if missing := wanted.keys() - saved.keys():
    found.append(f"{len(missing)} missing in the checkpoint: {grouped(missing)}")
  if unexpected := saved.keys() - wanted.keys():
    found.append(f"{len(unexpected)} in the checkpoint alone: {grouped(unexpected)}")
  if other := [
    path for path in sorted(wanted.keys() & saved.keys()) if saved[path] != wanted[path]
  ]:
    shapes = [f"{p} {saved[p]} in the checkpoint, {wanted[p]} wanted" for p in other[:5]]
    found.append(f"{len(other)} of another shape: {', '.join(shapes)}")
  if found:
    what = f"{where} does not fit this configuration (model, optimizer or EMA differ)"
    raise Mismatch(f"{what}. {'; '.join(found)}.")
