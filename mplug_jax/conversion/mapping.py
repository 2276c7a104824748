"""Parameter-name mapping between PyTorch checkpoints and parameters, in both directions.

The rows come from the tables of the formats. Every key must match exactly one row and every leaf
must be written exactly once; otherwise an error lists the remaining names. A format that lacks
leaves of a part (BERT: cross-attention) declares them.
"""

import collections
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mplug_jax.checkpoints.names import grouped, module_of
from mplug_jax.conversion import formats
from mplug_jax.conversion.formats.format import KINDS, Shapes, find_row
from mplug_jax.models.fusion import connected_layers
from mplug_jax.models.mplug import MPlug


def _no_arrays(array: np.ndarray) -> tuple[np.ndarray, ...]:
  raise ValueError("This tensor is not a parameter.")


def _no_array(arrays: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
  raise ValueError("This tensor is not a parameter.")


class Entry(NamedTuple):
  """The mapping of one PyTorch tensor.

  Attributes:
    action: "map" (parameter), "dead" (never run), "tied" (the same tensor as another key),
      "constant" or "queue".
    paths: paths of our leaves; () unless mapped.
    text: the other key if tied, else a description; "" if mapped.
    indices: for each path the index on the leaf's depth axis, or None.
    forward: array -> one array per leaf.
    inverse: (arrays, PyTorch shape) -> array.
  """

  action: str
  paths: tuple[str, ...] = ()
  text: str = ""
  indices: tuple[int | None, ...] = ()
  forward: Callable[[np.ndarray], tuple[np.ndarray, ...]] = _no_arrays
  inverse: Callable[[list[np.ndarray], tuple[int, ...]], np.ndarray] = _no_array


_DEPTH_FIELDS = {"text_encoder": "text_layers", "text_decoder": "decoder_layers"}


class Converter:
  """The table of one source for one model.

  Attributes:
    table: the Format of the source.
    leaves_new: regexes of leaves that the source lacks although it has their part of the model.
  """

  def __init__(self, keys: Collection[str], geometry: Mapping[str, Any]) -> None:
    """Chooses the table of the source.

    Args:
      keys: PyTorch names of the online weights.
      geometry: fields of MPlug; depths, stride and fusion are read.
    """
    self._geometry = geometry
    self.table = next(
      (
        fmt
        for fmt in formats.FORMATS
        if fmt.table_prefix and any(key.startswith(fmt.table_prefix) for key in keys)
      ),
      formats.FORMATS[0],
    )
    self._connected = connected_layers(
      geometry["fusion_layers"], geometry["stride"], geometry.get("fusion", "released")
    )
    self._placement = self.table.placement(keys, geometry)
    self.leaves_new = self._placement.leaves_new

  def _locate(self, target: str) -> tuple[str, int | None] | str:
    """Returns (path, depth index or None), or a reason if the model has no such leaf."""
    if target.startswith(self._placement.absent):
      return "a part that the source does not fill"
    if layer := re.search(r"<(\d+)>", target):
      j = int(layer[1]) - self._placement.first_fusion_layer
      if not 0 <= j < self._geometry["fusion_layers"]:
        return "a stored fusion layer that never runs"  # docs/official.md item 4
      if j in self._connected and "/crossattention" in target:
        return "the cross-attention of a connected layer, never run"  # item 2
      return target.replace(layer[0], str(j)), None
    if not (depth := re.search(r"\[(\d+)\]", target)):
      return target, None
    index = int(depth[1])
    field = _DEPTH_FIELDS.get(target.split("/")[0])
    if field and self._placement.spare_layer and index >= self._geometry[field]:
      return self._placement.spare_layer
    return target.replace(depth[0], ""), index

  def entry(self, key: str) -> Entry:
    """Returns the mapping of an online weight, by its PyTorch name.

    Raises:
      KeyError: the key does not match exactly one row of the table.
    """
    targets, kind, rest = find_row(self.table, key)
    if isinstance(targets, str):
      return Entry(kind, text=targets)
    results = [self._locate(target) for target in targets]
    locations = [result for result in results if isinstance(result, tuple)]
    if not locations:
      return Entry("dead", text=str(results[0]))
    rests, forward, inverse = KINDS[kind][rest]
    return Entry(
      "map",
      tuple(path + rest for path, _ in locations for rest in rests),
      "",
      tuple(index for _, index in locations for _ in rests),
      lambda x: forward(x) * len(locations),
      lambda parts, shape: inverse(parts[: len(rests)], shape),
    )

  def pieces(self, key: str, array: np.ndarray) -> list[tuple[str, int | None, np.ndarray]]:
    """Converts one PyTorch tensor.

    Args:
      key: PyTorch name of an online weight.
      array: its values.

    Returns:
      [(path of ours, index on its depth axis or None, array)]; [] unless it is a parameter.

    Raises:
      KeyError: the key does not match exactly one row of the table.
    """
    entry = self.entry(key)
    if entry.action != "map":
      return []
    return list(zip(entry.paths, entry.indices, entry.forward(np.asarray(array)), strict=True))


def online_names(names: Iterable[str], momentum: bool = False) -> dict[str, str]:
  """Returns {PyTorch name of the online weight: name in the state dict}.

  Args:
    names: names of a state dict.
    momentum: select the momentum copies instead of the online weights.
  """
  copy = re.compile(r"^(\w+)_m(\.|$)")
  return {copy.sub(r"\1\2", key): key for key in names if bool(copy.match(key)) == momentum}


def leaf_shapes(geometry: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """Returns {path: shape} of every parameter that a PyTorch tensor can fill."""
  return dict(_leaf_shapes(tuple(sorted(geometry.items()))))


@functools.lru_cache(maxsize=16)
def _leaf_shapes(geometry: tuple[tuple[str, Any], ...]) -> dict[str, tuple[int, ...]]:
  # Parameters do not depend on the operations; the reference ones are traced in less time.
  fields: dict[str, Any] = dict(geometry)
  fields.update(ops="reference", attention_impl="reference")
  model = MPlug(**fields)

  def everything(m: Any, pixels: Any, ids: Any) -> Any:
    """Calls every module that has parameters."""
    mask = ids > 0
    image = m.encode_image(pixels)
    text = m.encode_text(ids, mask)
    m.contrastive_features(image, text)
    image, text = m.fuse(text, mask, image)
    m.match_logits(text)
    m.mlm_logits(text)
    m.decode(ids, mask, m.memory(image, text, mask))
    return m.contrastive_temperature()

  size = model.image_size
  params = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0),
      jnp.zeros((1, size, size, 3)),
      jnp.zeros((1, 1), jnp.int32),
      method=everything,
    )
  )["params"]
  flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
  return {path: x.shape for path, x in flat.items()}


def _refuse(problems: Mapping[str, list[str]]) -> None:
  """Raises one ValueError with the counted and grouped names of all {problem: [names]}."""
  texts = [
    f"{len(names)} {problem}: {grouped(names, '/' if '/' in names[0] else '.')}"
    for problem, names in problems.items()
    if names
  ]
  if texts:
    raise ValueError(f"The PyTorch tensors do not fit the model: {'; '.join(texts)}.")


def plan(shapes: Shapes, geometry: Mapping[str, Any]) -> dict[str, Entry]:
  """Checks names and shapes against the table and the model, before any values are read.

  Args:
    shapes: {PyTorch name of an online weight: shape}.
    geometry: fields of MPlug.

  Returns:
    {PyTorch name: Entry}.

  Raises:
    ValueError: unknown names, leaves written twice or not at all, or wrong shapes; counted and
      grouped.
  """
  converter = Converter(shapes, geometry)
  expected = leaf_shapes(geometry)
  entries = {}
  written = collections.Counter()
  problems = {
    "unknown tensors": [],
    "tensors of another shape": [],
    "leaves written twice": [],
    "leaves missing": [],
  }
  for key, shape in shapes.items():
    try:
      entries[key] = entry = converter.entry(key)
    except KeyError:
      problems["unknown tensors"].append(key)
      continue
    if entry.action != "map":
      continue
    written.update(zip(entry.paths, entry.indices))
    if not _fits(entry, shape, expected):
      leaves = ", ".join(f"{path} {list(expected.get(path, ()))}" for path in entry.paths)
      problems["tensors of another shape"].append(f"{key} {list(shape)} (for {leaves})")
  slots = {
    (path, i)
    for path, shape in expected.items()
    for i in (range(shape[0]) if re.search(r"/(blocks|layers)/", path) else [None])
  }
  present = {module_of(path) for path, _ in written}
  slots = {
    (path, i)
    for path, i in slots
    if not any(re.fullmatch(regex, path) for regex in converter.leaves_new)
  }
  problems["leaves written twice"] = [_slot_name(*slot) for slot, n in written.items() if n > 1]
  problems["leaves missing"] = [
    _slot_name(*slot)
    for slot in sorted(slots - written.keys(), key=str)
    if module_of(slot[0]) in present
  ]
  if any(key.startswith("fusion_encoder.") for key in shapes) and "fusion_encoder" not in present:
    problems["leaves missing"].append("fusion_encoder")
  _refuse(problems)
  return entries


def _slot_name(path: str, index: int | None) -> str:
  return path if index is None else f"{path}[{index}]"


def _fits(entry: Entry, shape: tuple[int, ...], expected: Shapes) -> bool:
  """Returns whether a tensor of `shape` gives leaves, or slices of them, of the expected shapes."""
  try:
    # One number, broadcast to the shape of the tensor, needs no memory.
    parts = entry.forward(np.broadcast_to(np.float32(0.0), shape))
  except (ValueError, TypeError):
    return False
  for path, index, part in zip(entry.paths, entry.indices, parts, strict=True):
    leaf = expected.get(path)
    if leaf is None or part.shape != (leaf if index is None else leaf[1:]):
      return False
    if index is not None and index >= leaf[0]:
      return False
  return True


def params_from_torch(
  state_dict: Mapping[str, np.ndarray],
  geometry: Mapping[str, Any],
  momentum: bool = False,
  dtype: Any = None,
) -> dict[str, Any]:
  """Converts an official mPLUG state dict to parameters of `MPlug`.

  Beside the result, one tensor at a time is in memory.

  Args:
    state_dict: {PyTorch name: array}, names as returned by `names.official_name`; may be lazy.
    geometry: fields of MPlug.
    momentum: convert the momentum copies (`text_encoder_m...`) instead of the online weights.
    dtype: of the result; None: for each leaf one that represents its tensors without loss.

  Returns:
    Nested dict of arrays, ready for `model.apply({"params": ...})`, of the parts in the state dict.

  Raises:
    ValueError: tensors do not fit the model, or two names of one tensor have different values.
  """
  keys = online_names(state_dict, momentum)
  # A TensorFile returns shapes without reading the tensors.
  shape_of = getattr(state_dict, "shape", lambda name: state_dict[name].shape)
  entries = plan({key: shape_of(source) for key, source in keys.items()}, geometry)
  shapes = leaf_shapes(geometry)
  leaves = {}
  for key, entry in entries.items():
    if (
      entry.action == "tied"
      and entry.text in keys
      and not np.array_equal(state_dict[keys[key]], state_dict[keys[entry.text]])
    ):
      raise ValueError(untied(keys[key], keys[entry.text]))
    if entry.action != "map":
      continue
    for path, index, part in zip(
      entry.paths, entry.indices, entry.forward(np.asarray(state_dict[keys[key]])), strict=True
    ):
      if path not in leaves:
        leaves[path] = np.empty(shapes[path], dtype or part.dtype)
      elif dtype is None and leaves[path].dtype != part.dtype:  # layers of one stack may differ
        leaves[path] = leaves[path].astype(jnp.promote_types(leaves[path].dtype, part.dtype))
      leaves[path][... if index is None else index] = part
  return traverse_util.unflatten_dict(leaves, sep="/")


def untied(name: str, other: str) -> str:
  """Returns the error message for two names of one tensor with different values."""
  return f"{name} and {other} are one tensor in the official model, but their values differ here."


def tensor_to_torch(
  entry: Entry, leaf: Callable[[str], np.ndarray], shape: tuple[int, ...]
) -> np.ndarray:
  """Converts leaves to one PyTorch tensor.

  Args:
    entry: mapping of the tensor, with action "map".
    leaf: path -> array, complete stacks of layers.
    shape: of the PyTorch tensor.
  """
  parts = [
    np.asarray(leaf(path)) if index is None else np.asarray(leaf(path))[index]
    for path, index in zip(entry.paths, entry.indices)
  ]
  return np.ascontiguousarray(entry.inverse(parts, shape)).reshape(shape)
