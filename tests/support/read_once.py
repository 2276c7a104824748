"""Parameters of checkpoints that a test process reads once, however often they are evaluated."""

import functools

import jax

from mplug_jax.checkpoints import reading
from mplug_jax.parallel import rules

_arrays = functools.cache(reading.load_arrays)


def load_params(path, abstract_params, which="params"):
  """Returns what checkpoints.reading.load_params returns; nothing may change the checkpoint."""
  arrays = _arrays(str(path), which)
  return jax.tree.map_with_path(
    lambda keys, like: reading.placed(arrays[rules.path_name(keys)], like), abstract_params
  )
