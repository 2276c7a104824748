"""Starting a run from other weights: converted checkpoints, or runs of the same or another task."""

import collections
import re

import jax
from flax import traverse_util

from mplug_jax.checkpoints import reading
from mplug_jax.checkpoints.names import grouped, module_of
from mplug_jax.checkpoints.position_embeddings import LEAF as POSITIONS
from mplug_jax.checkpoints.position_embeddings import resize_positions


def _matches(patterns, name):
  return any(re.fullmatch(pattern, name) for pattern in patterns)


def _sources(paths):
  """[(path, {which: {leaf: array}})], parameters and their averages."""
  trees = [
    (path, {which: reading.load_arrays(path, which) for which in ("params", "ema_params")})
    for path in paths
  ]
  for path, tree in trees:
    if not tree["params"]:
      raise ValueError(f"config.init.paths: {path} holds no parameters.")
  return trees


def _fitted(name, array, shape, path):
  """The array in the model's shape; a table of positions is resized."""
  if name == POSITIONS and array.shape != shape and array.shape[1:] == shape[1:]:
    return resize_positions(
      array, shape[0]
    ), f"{path}, resized from {len(array)} to {shape[0]} positions"
  if array.shape != shape:
    raise ValueError(
      f"{name} has shape {array.shape} in {path} and {shape} in the model; "
      "set config.model to the checkpoint's geometry."
    )
  return array, path


def _find(name, sources, copies):
  """-> (path, tree, name there) of the first checkpoint with the parameter, else of the first with what it is a copy of, else None."""
  originals = [
    re.sub(pattern, original, name) for pattern, original in copies if re.fullmatch(pattern, name)
  ]
  return next(
    ((path, tree, n) for n in (name, *originals) for path, tree in sources if n in tree["params"]),
    None,
  )


def init_from(state, options):
  """A fresh TrainState with parameters, and averages where it keeps any, from other checkpoints.

  Args:
    state: TrainState, newly made.
    options: config.init: paths (results of convert_checkpoint or runs; where two hold a parameter,
      the first counts), new (regexes of whole parameter names that may keep their random values),
      unused (of those in a checkpoint that the model may lack), copies ((regex, replacement), ...:
      a parameter that is nowhere found starts as the one with the replaced name). A parameter of
      `new` whose shape is another one in a checkpoint keeps its random values too.

  Returns:
    (state, {parameter: where it came from}).

  Raises:
    ValueError: parameters that are nowhere found, left over or of another shape; counted and
      grouped.
    FileNotFoundError, checkpoint.CheckpointError: a checkpoint that cannot be read.
  """
  sources = _sources(options.paths)
  wanted = traverse_util.flatten_dict(state.params, sep="/")
  found, averages, report = {}, {}, {}
  for name, leaf in wanted.items():
    match = _find(name, sources, options.copies)
    path, tree, original = match or (None, None, None)
    if (
      match is None
      or name != POSITIONS
      and tree["params"][original].shape != leaf.shape
      and _matches(options.new, name)
    ):
      report[name] = "new"
      continue
    found[name], report[name] = _fitted(name, tree["params"][original], leaf.shape, path)
    averages[name] = _fitted(
      name, tree["ema_params"].get(original, tree["params"][original]), leaf.shape, path
    )[0]
  missing = [
    name for name, where in report.items() if where == "new" and not _matches(options.new, name)
  ]
  extra = {name for _, tree in sources for name in tree["params"]} - wanted.keys()
  unused = sorted(name for name in extra if not _matches(options.unused, name))
  problems = [
    (missing, "parameters are in none of the checkpoints", "new"),
    (unused, "parameters of the checkpoints have no place", "unused"),
  ]
  if texts := [
    f"{len(names)} {what} ({grouped(names)}); allow it with regexes in config.init.{field}"
    for names, what, field in problems
    if names
  ]:
    raise ValueError(f"config.init.paths: {'; '.join(texts)}.")
  params = traverse_util.unflatten_dict(
    {
      name: reading.placed(found[name], leaf) if name in found else leaf
      for name, leaf in wanted.items()
    },
    sep="/",
  )
  state = state.replace(params=params)
  if jax.tree.leaves(state.ema_params):
    state = state.replace(
      ema_params=traverse_util.unflatten_dict(
        {
          name: reading.placed(averages[name], leaf) if name in averages else leaf
          for name, leaf in traverse_util.flatten_dict(state.ema_params, sep="/").items()
        },
        sep="/",
      )
    )
  return state, report


def load_params(path, abstract_params, which="params"):
  """The parameters that a model needs, from a checkpoint of any task that has them.

  Args:
    path: run folder, or converted checkpoint. abstract_params: pytree of ShapeDtypeStruct with
      shardings.
    which: "params" or "ema_params".

  Returns:
    The parameters, placed as `abstract_params` says; positions are resized to the model's.

  Raises:
    ValueError: some are missing or have another shape; counted and grouped.
    FileNotFoundError, checkpoint.CheckpointError: see checkpoint.load_params.
  """
  wanted = traverse_util.flatten_dict(abstract_params, sep="/")
  there = {
    name.removeprefix(f"{which}/"): shape
    for name, shape in reading.array_shapes(path).items()
    if name.startswith(f"{which}/")
  }
  if not there or there == {name: tuple(leaf.shape) for name, leaf in wanted.items()}:
    return reading.load_params(path, abstract_params, which)
  missing = [name for name in wanted if name not in there]
  other = [
    f"{name} {list(there[name])} instead of {list(leaf.shape)}"
    for name, leaf in wanted.items()
    if name != POSITIONS and there.get(name, leaf.shape) != leaf.shape
  ]
  if missing or other:
    lacks = [f"{len(missing)} parameters are not in it ({grouped(missing)})"] * bool(missing)
    differ = [f"{len(other)} have another shape ({', '.join(other[:3])})"] * bool(other)
    raise ValueError(f"{path} does not fit this configuration: {'; '.join(lacks + differ)}.")
  arrays = reading.load_arrays(path, which)
  return traverse_util.unflatten_dict(
    {
      name: reading.placed(_fitted(name, arrays[name], leaf.shape, path)[0], leaf)
      for name, leaf in wanted.items()
    },
    sep="/",
  )


def summary(report):
  """{parameter: where it came from} -> lines of text, one for each part of the model and source."""
  counts = collections.Counter((module_of(name), where) for name, where in report.items())
  return [
    f"{module}: {n} parameters {'at random' if where == 'new' else f'from {where}'}"
    for (module, where), n in sorted(counts.items())
  ]
