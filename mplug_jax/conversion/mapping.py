"""PyTorch tensors <-> our parameters, by the tables of the formats, which are read in both directions.

Every key matches exactly one row and every leaf is written exactly once; everything else is an error that lists what is
left over. A source that by its nature lacks leaves of a part (BERT: cross-attention) declares them.
"""

import collections
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mplug_jax.checkpoints.names import grouped, module_of
from mplug_jax.conversion import formats
from mplug_jax.conversion.formats.format import KINDS, find_row
from mplug_jax.models.fusion import connected_layers
from mplug_jax.models.mplug import MPlug


class Entry(NamedTuple):
  """What one PyTorch tensor is to us.

  action: "map" (parameter), "dead" (never run), "tied" (the same tensor as another key), "constant" or "queue".
  target: of map: paths of our leaves; otherwise a text: why, which key, what.
  indices: of map: for each path the place on the leaf's depth axis, or None.
  forward: array -> one array per leaf. inverse: (arrays, PyTorch shape) -> array.
  """

  action: str
  target: tuple | str
  indices: tuple = ()
  forward: object = None
  inverse: object = None


class Converter:
  """The table of one source for one model.

  Attributes:
    leaves_new: regexes of the leaves that the source leaves new, although it has their part of the model.
  """

  def __init__(self, keys, geometry):
    """keys: PyTorch names of the online weights. geometry: fields of MPlug (depths, stride, fusion are read)."""
    self._geometry = geometry
    self._table = next(
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
    self._placement = self._table.placement(keys, geometry)
    self.leaves_new = self._placement.leaves_new

  def _place(self, target):
    """Target -> (path, index on its depth axis or None), or the reason why the model has no such place."""
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
    index, field = (
      int(depth[1]),
      {"text_encoder": "text_layers", "text_decoder": "decoder_layers"}.get(target.split("/")[0]),
    )
    if field and self._placement.spare_layer and index >= self._geometry[field]:
      return self._placement.spare_layer
    return target.replace(depth[0], ""), index

  def entry(self, key):
    """PyTorch name of an online weight -> Entry.

    Raises:
      KeyError: the key does not match exactly one row of the table.
    """
    targets, kind, rest = find_row(self._table, key)
    if kind not in KINDS:
      return Entry(kind, targets)
    places = [self._place(target) for target in targets]
    found = [place for place in places if isinstance(place, tuple)]
    if not found:
      return Entry("dead", places[0])
    rests, forward, inverse = KINDS[kind][rest]
    return Entry(
      "map",
      tuple(path + rest for path, _ in found for rest in rests),
      tuple(index for _, index in found for _ in rests),
      lambda x: forward(x) * len(found),
      lambda parts, shape: inverse(parts[: len(rests)], shape),
    )

  def pieces(self, key, array):
    """One PyTorch tensor -> [(path of ours, index on its depth axis or None, array)]; [] for what is no parameter.

    Raises:
      KeyError: see `entry`.
    """
    entry = self.entry(key)
    if entry.action != "map":
      return []
    return list(zip(entry.target, entry.indices, entry.forward(np.asarray(array)), strict=True))


def online_names(state_dict, momentum=False):
  """{PyTorch name of the online weight: key in the state dict}, of the online weights or of their momentum copies."""
  copy = re.compile(r"^(\w+)_m(\.|$)")
  return {copy.sub(r"\1\2", key): key for key in state_dict if bool(copy.match(key)) == momentum}


def leaf_shapes(geometry):
  """Fields of MPlug -> {path: shape} of every parameter that a PyTorch tensor can fill."""
  return dict(_leaf_shapes(tuple(sorted(geometry.items()))))


@functools.lru_cache(maxsize=16)
def _leaf_shapes(geometry):
  model = MPlug(**dict(geometry))

  def everything(m, image, ids):
    mask = ids > 0
    image, text = m.encode_image(image), m.encode_text(ids, mask)
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
  return {path: x.shape for path, x in traverse_util.flatten_dict(params, sep="/").items()}


def _refuse(problems):
  """Raises one ValueError that counts and groups what is wrong; `problems` is {what: [names]}."""
  found = [
    f"{len(names)} {what}: {grouped(names, '/' if '/' in names[0] else '.')}"
    for what, names in problems.items()
    if names
  ]
  if found:
    raise ValueError(f"The PyTorch tensors do not fit the model: {'; '.join(found)}.")


def plan(shapes, geometry):
  """Checks names and shapes against the table and the model, before any number is read.

  Args:
    shapes: {PyTorch name of an online weight: shape}.
    geometry: fields of MPlug.

  Returns:
    {PyTorch name: Entry}.

  Raises:
    ValueError: unknown names, leaves written twice or not at all, wrong shapes, untied copies; counted and grouped.
  """
  converter, expected = Converter(shapes, geometry), leaf_shapes(geometry)
  entries, written = {}, collections.Counter()
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
    written.update(zip(entry.target, entry.indices))
    if not _fits(entry, shape, expected):
      wanted = ", ".join(f"{path} {list(expected.get(path, ()))}" for path in entry.target)
      problems["tensors of another shape"].append(f"{key} {list(shape)} (for {wanted})")
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
  name = lambda path, i: path if i is None else f"{path}[{i}]"  # noqa: E731
  problems["leaves written twice"] = [name(*slot) for slot, n in written.items() if n > 1]
  problems["leaves missing"] = [
    name(*slot) for slot in sorted(slots - written.keys(), key=str) if module_of(slot[0]) in present
  ]
  if any(key.startswith("fusion_encoder.") for key in shapes) and "fusion_encoder" not in present:
    problems["leaves missing"].append("fusion_encoder")
  _refuse(problems)
  return entries


def _fits(entry, shape, expected):
  """Whether a tensor of `shape` gives leaves (or slices of stacked ones) of the expected shapes."""
  try:
    parts = entry.forward(
      np.broadcast_to(np.float32(0.0), shape)
    )  # one number, seen as a whole tensor
  except (ValueError, TypeError):
    return False
  for path, index, part in zip(entry.target, entry.indices, parts, strict=True):
    leaf = expected.get(path)
    if leaf is None or part.shape != (leaf if index is None else leaf[1:]):
      return False
    if index is not None and index >= leaf[0]:
      return False
  return True


def params_from_torch(state_dict, geometry, momentum=False, dtype=None):
  """Official mPLUG state dict -> parameters of `MPlug`; one tensor at a time is in memory besides the result.

  Args:
    state_dict: {PyTorch key: array}, names as `names.official_name` makes them; may read its arrays when asked.
    geometry: fields of MPlug.
    momentum: take the momentum copies (`text_encoder_m...`) instead of the online weights.
    dtype: of the result; None: for each leaf the one that holds its tensors' without loss.

  Returns:
    Nested dict of arrays, ready for `model.apply({"params": ...})`, of the parts that the state dict has.

  Raises:
    ValueError: tensors that do not fit the model, see `plan`, or two names of one tensor with different values.
  """
  keys = online_names(state_dict, momentum)
  shape_of = getattr(
    state_dict, "shape", lambda name: state_dict[name].shape
  )  # of a file without reading it
  entries = plan({key: shape_of(source) for key, source in keys.items()}, geometry)
  shapes, leaves = leaf_shapes(geometry), {}
  for key, entry in entries.items():
    if (
      entry.action == "tied"
      and entry.target in keys
      and not np.array_equal(state_dict[keys[key]], state_dict[keys[entry.target]])
    ):
      raise ValueError(
        f"{keys[key]} and {keys[entry.target]} are one tensor in the official model, but differ in these tensors."
      )
    if entry.action != "map":
      continue
    for path, index, part in zip(
      entry.target, entry.indices, entry.forward(np.asarray(state_dict[keys[key]])), strict=True
    ):
      if path not in leaves:
        leaves[path] = np.empty(shapes[path], dtype or part.dtype)
      elif (
        dtype is None and leaves[path].dtype != part.dtype
      ):  # layers of one stack, stored differently
        leaves[path] = leaves[path].astype(jnp.promote_types(leaves[path].dtype, part.dtype))
      leaves[path][... if index is None else index] = part
  return traverse_util.unflatten_dict(leaves, sep="/")


def tensor_to_torch(entry, leaf, shape):
  """The inverse: one PyTorch tensor of `shape` from our leaves.

  Args:
    entry: of a key, with action "map". leaf: function path -> array, whole stacks.
  """
  parts = [
    np.asarray(leaf(path)) if index is None else np.asarray(leaf(path))[index]
    for path, index in zip(entry.target, entry.indices)
  ]
  return np.ascontiguousarray(entry.inverse(parts, shape)).reshape(shape)


def geometry_from_recording(meta):
  """The `meta` of arrays recorded from the official code (geometry, bert_config, config, ids) -> fields of MPlug."""
  geometry, bert = meta["geometry"], meta["bert_config"]
  return dict(
    image_size=geometry["image"],
    patch_size=geometry["patch"],
    vision_width=geometry["vision_width"],
    vision_layers=geometry["vision_layers"],
    vocab_size=bert["vocab_size"],
    hidden_size=bert["hidden_size"],
    heads=bert["num_attention_heads"],
    mlp_dim=bert["intermediate_size"],
    max_positions=bert["max_position_embeddings"],
    text_layers=meta.get("text_encoder_layers_kept", bert["text_encoder_layers"]),
    fusion_layers=bert["fusion_layers"],
    stride=bert["stride_layer"],
    decoder_layers=bert["text_decode_layers"],
    embed_dim=meta["config"]["embed_dim"],
    pad_id=bert["pad_token_id"],
  )
