"""Starts a run from other weights: converted checkpoints, or runs of the same or another task."""

import collections
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from flax import traverse_util

from mplug_jax.checkpoints import reading
from mplug_jax.checkpoints.names import grouped, module_of
from mplug_jax.checkpoints.position_embeddings import LEAF as POSITIONS
from mplug_jax.checkpoints.position_embeddings import resize_positions
from mplug_jax.tensor_files import finite


class _Source(NamedTuple):
  """A checkpoint: its path, and {leaf: array} of its parameters and of their averages."""

  path: str
  params: dict[str, np.ndarray]
  averages: dict[str, np.ndarray]


def _matches(patterns: Iterable[str], name: str) -> bool:
  return any(re.fullmatch(pattern, name) for pattern in patterns)


def _flat(tree: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep="/")


def _sources(paths: Iterable[str]) -> list[_Source]:
  """Reads the checkpoints; raises ValueError if one has no parameters."""
  sources = []
  for path in paths:
    params = reading.load_arrays(path, "params")
    if not params:
      raise ValueError(f"config.init.paths: {path} holds no parameters.")
    sources.append(_Source(path, params, reading.load_arrays(path, "ema_params")))
  return sources


def _fitted(
  name: str, array: np.ndarray, shape: tuple[int, ...], path: str | os.PathLike[str]
) -> tuple[np.ndarray, str]:
  """Returns the array in the model's shape, position tables resized, and its origin as text."""
  if name == POSITIONS and array.shape != shape and array.shape[1:] == shape[1:]:
    origin = f"{path}, resized from {len(array)} to {shape[0]} positions"
    return resize_positions(array, shape[0]), origin
  if array.shape != shape:
    raise ValueError(
      f"{name} has shape {array.shape} in {path} and {shape} in the model; "
      "set config.model to the checkpoint's geometry."
    )
  return array, str(path)


def _find(
  name: str, sources: Sequence[_Source], copies: Iterable[tuple[str, str]]
) -> tuple[_Source, str] | None:
  """Returns the first checkpoint with the parameter, or with one that it copies, and that name."""
  originals = [
    re.sub(pattern, original, name) for pattern, original in copies if re.fullmatch(pattern, name)
  ]
  for candidate in (name, *originals):
    for source in sources:
      if candidate in source.params:
        return source, candidate
  return None


def _check_complete(
  options: Any, wanted: Iterable[str], report: Mapping[str, str], sources: Sequence[_Source]
) -> None:
  """Raises ValueError for undeclared parameters that are missing or unused."""
  missing = [
    name for name, origin in report.items() if origin == "new" and not _matches(options.new, name)
  ]
  extra = {name for source in sources for name in source.params} - set(wanted)
  unused = sorted(name for name in extra if not _matches(options.unused, name))
  problems = []
  for names, problem, field in (
    (missing, "parameters are in none of the checkpoints", "new"),
    (unused, "parameters of the checkpoints have no place", "unused"),
  ):
    if names:
      problems.append(
        f"{len(names)} {problem} ({grouped(names)}); allow it with regexes in config.init.{field}"
      )
  if problems:
    raise ValueError(f"config.init.paths: {'; '.join(problems)}.")


def _replaced(tree: Any, arrays: Mapping[str, np.ndarray]) -> Any:
  """Returns the tree with these leaves replaced, placed as before."""
  leaves = {
    name: reading.placed(arrays[name], leaf) if name in arrays else leaf
    for name, leaf in _flat(tree).items()
  }
  return traverse_util.unflatten_dict(leaves, sep="/")


def _check_finite(arrays: Mapping[str, np.ndarray], report: Mapping[str, str]) -> None:
  """Raises ValueError if a value is NaN or infinite."""
  counts = {name: finite.count_nonfinite(array) for name, array in arrays.items()}
  if counts := {name: count for name, count in counts.items() if count}:
    origins = ", ".join(dict.fromkeys(report[name] for name in counts))
    raise ValueError(
      f"config.init.paths: {finite.describe(counts)}, of {origins}. No loss would be finite; start "
      "from another checkpoint."
    )


def _warn_nonfinite(path: str | os.PathLike[str], params: Any) -> Any:
  """Logs which parameters on the devices are not finite; returns them all."""
  counts = {}
  for name, leaf in _flat(params).items():
    parts = (part.data for part in leaf.addressable_shards if part.replica_id == 0)
    if count := sum(finite.count_nonfinite(np.asarray(part)) for part in parts):
      counts[name] = count
  if counts:
    logging.warning("%s: %s. What depends on them is NaN.", path, finite.describe(counts))
  return params


def init_from(state: Any, options: Any) -> tuple[Any, dict[str, str]]:
  """Fills a fresh TrainState with parameters of other checkpoints, and averages if it keeps any.

  Args:
    state: new TrainState.
    options: config.init: paths (results of convert_checkpoint or runs; the first one with a
      parameter counts), new (regexes of whole names of parameters that may keep their random
      values), unused (regexes of checkpoint parameters that the model may lack), copies ((regex,
      replacement), ...: a parameter that no checkpoint has starts as the one with the replaced
      name). A parameter of `new` whose shape differs in the checkpoint also keeps its random
      values.

  Returns:
    The state, and {parameter: origin}: "new" or the checkpoint's path.

  Raises:
    ValueError: parameters are missing, left over, of another shape or not finite; counted and
      grouped.
    FileNotFoundError, CheckpointError: a checkpoint cannot be read.
  """
  sources = _sources(options.paths)
  wanted = _flat(state.params)
  params: dict[str, np.ndarray] = {}
  averages: dict[str, np.ndarray] = {}
  report: dict[str, str] = {}
  for name, leaf in wanted.items():
    match = _find(name, sources, options.copies)
    if match is None:
      report[name] = "new"
      continue
    source, original = match
    array = source.params[original]
    if name != POSITIONS and array.shape != leaf.shape and _matches(options.new, name):
      report[name] = "new"
      continue
    params[name], report[name] = _fitted(name, array, leaf.shape, source.path)
    averages[name], _ = _fitted(name, source.averages.get(original, array), leaf.shape, source.path)
  _check_complete(options, wanted, report, sources)
  averaged = bool(jax.tree.leaves(state.ema_params))
  _check_finite(params, report)
  state = state.replace(params=_replaced(state.params, params))
  if averaged:
    _check_finite(averages, report)
    state = state.replace(ema_params=_replaced(state.ema_params, averages))
  return state, report


def load_params(path: str | os.PathLike[str], abstract_params: Any, which: str = "params") -> Any:
  """Loads the parameters of a model from a checkpoint of any task that has them.

  Args:
    path: run folder or converted checkpoint.
    abstract_params: pytree of ShapeDtypeStruct with shardings.
    which: "params" or "ema_params".

  Returns:
    The parameters, placed like `abstract_params`; position tables are resized to the model's.
    Those with values that are NaN or infinite are named in the log.

  Raises:
    ValueError: parameters are missing or have another shape; counted and grouped.
    FileNotFoundError, CheckpointError: see reading.load_params.
  """
  wanted = _flat(abstract_params)
  saved = {
    name.removeprefix(f"{which}/"): shape
    for name, shape in reading.array_shapes(path).items()
    if name.startswith(f"{which}/")
  }
  if not saved or saved == {name: tuple(leaf.shape) for name, leaf in wanted.items()}:
    return _warn_nonfinite(path, reading.load_params(path, abstract_params, which))
  missing = [name for name in wanted if name not in saved]
  other = [
    f"{name} {list(saved[name])} instead of {list(leaf.shape)}"
    for name, leaf in wanted.items()
    if name != POSITIONS and saved.get(name, leaf.shape) != leaf.shape
  ]
  problems = []
  if missing:
    problems.append(f"{len(missing)} parameters are not in it ({grouped(missing)})")
  if other:
    problems.append(f"{len(other)} have another shape ({', '.join(other[:3])})")
  if problems:
    raise ValueError(f"{path} does not fit this configuration: {'; '.join(problems)}.")
  arrays = reading.load_arrays(path, which)
  fitted = {name: _fitted(name, arrays[name], leaf.shape, path)[0] for name, leaf in wanted.items()}
  return _warn_nonfinite(path, _replaced(abstract_params, fitted))


def summary(report: Mapping[str, str]) -> list[str]:
  """Returns lines of text, one for each part of the model and origin.

  Args:
    report: {parameter: origin}, see `init_from`.
  """
  counts = collections.Counter((module_of(name), origin) for name, origin in report.items())
  return [
    f"{module}: {count} parameters {'at random' if origin == 'new' else f'from {origin}'}"
    for (module, origin), count in sorted(counts.items())
  ]
