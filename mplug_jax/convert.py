"""The official PyTorch tensors <-> our parameters, by one table that is read in both directions.

A row of TABLE is (regex on the whole PyTorch key, target, kind). For kinds of KINDS the target is a path of ours: `\\1` is the
regex's group, `[\\1]` an index on a leading depth axis, `<\\1>` a stored fusion layer, counted from the first one that runs.
For the others it says what the tensor is instead of a parameter. Every key matches exactly one row and every leaf is
written exactly once; everything else is an error that lists what is left over.
"""

import collections
import functools
import re
from typing import NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.checkpoint import grouped
from mplug_jax.models.fusion import connected_layers
from mplug_jax.models.mplug import MPlug

_BERT_LAYER = (
    (r"attention\.self\.(query|key|value)", r"attention/\2", "linear"),
    (r"attention\.output\.dense", r"attention/out", "linear"),
    (r"attention\.output\.LayerNorm", r"attention_norm", "norm"),
    (r"crossattention\.self\.(query|key|value)", r"crossattention/\2", "linear"),
    (r"crossattention\.output\.dense", r"crossattention/out", "linear"),
    (r"crossattention\.output\.LayerNorm", r"crossattention_norm", "norm"),
    (r"intermediate\.dense", r"intermediate", "linear"),
    (r"output\.dense", r"output", "linear"),
    (r"output\.LayerNorm", r"output_norm", "norm"),
)


def _bert_layers(prefix, path):
  return tuple((rf"{prefix}\.encoder\.layer\.(\d+)\.{key}", f"{path}/{ours}", kind) for key, ours, kind in _BERT_LAYER)


def _embeddings(prefix, path):
  tables = ("word", "position", "token_type")
  return (*((rf"{prefix}\.embeddings\.{t}_embeddings\.weight", f"{path}/embeddings/{t}/embedding", "copy") for t in tables),
          (rf"{prefix}\.embeddings\.LayerNorm", f"{path}/embeddings/norm", "norm"),
          (rf"{prefix}\.embeddings\.position_ids", "0, 1, 2, ...", "constant"))


def _head(prefix, path):
  return ((prefix + r"\.transform\.dense", f"{path}/dense", "linear"),
          (prefix + r"\.transform\.LayerNorm", f"{path}/norm", "norm"),
          (prefix + r"\.bias", f"{path}/bias", "copy"),
          (prefix + r"\.decoder\.bias", prefix.replace("\\", "") + ".bias", "tied"))


_VISUAL = r"visual_encoder\.visual"
_BLOCK = _VISUAL + r"\.transformer\.resblocks\.(\d+)"
TABLE = (
    (_VISUAL + r"\.class_embedding", "visual_encoder/class_embedding", "copy"),
    (_VISUAL + r"\.positional_embedding", "visual_encoder/position_embedding", "copy"),
    (_VISUAL + r"\.conv1\.weight", "visual_encoder/patch_embed/kernel", "patches"),
    (_VISUAL + r"\.(ln_pre|ln_post)", r"visual_encoder/\1", "norm"),
    (_BLOCK + r"\.attn\.in_proj", r"visual_encoder/blocks[\1]/attention", "qkv"),
    (_BLOCK + r"\.attn\.out_proj", r"visual_encoder/blocks[\1]/attention/out", "linear"),
    (_BLOCK + r"\.(ln_1|ln_2)", r"visual_encoder/blocks[\1]/\2", "norm"),
    (_BLOCK + r"\.mlp\.c_fc", r"visual_encoder/blocks[\1]/mlp/up", "linear"),
    (_BLOCK + r"\.mlp\.c_proj", r"visual_encoder/blocks[\1]/mlp/down", "linear"),
    # docs/official.md item 42.
    (_VISUAL + r"\.proj", "CLIP's own projection, never used", "dead"),
    (r"visual_encoder\.(?!visual\.).*", "CLIP's text tower, never run", "dead"),
    (r"visn_fc", "visn_fc", "linear"),
    (r"visn_layer_norm", "visn_layer_norm", "norm"),
    *_embeddings("text_encoder", "text_encoder"),
    *_bert_layers("text_encoder", r"text_encoder/layers[\1]"),
    (r"(text_encoder|fusion_encoder)\.pooler\..*", "BERT's pooler, never run", "dead"),
    (r"fusion_encoder\.embeddings\.position_ids", "0, 1, 2, ...", "constant"),
    (r"fusion_encoder\.embeddings\.(?!position_ids).*", "the fusion encoder's embeddings, never run", "dead"),
    *_bert_layers("fusion_encoder", r"fusion_encoder/layer_<\1>"),
    *_head(r"fusion_encoder\.cls\.predictions", "fusion_encoder/mlm_head/head"),
    (r"fusion_encoder\.cls\.predictions\.decoder\.weight", "fusion_encoder/mlm_head/word/embedding", "copy"),
    *_embeddings(r"text_decoder\.bert", "text_decoder"),
    *_bert_layers(r"text_decoder\.bert", r"text_decoder/layers[\1]"),
    *_head(r"text_decoder\.cls\.predictions", "text_decoder/head"),
    (r"text_decoder\.cls\.predictions\.decoder\.weight", "text_decoder.bert.embeddings.word_embeddings.weight", "tied"),
    (r"(vision_proj|text_proj|itm_head)", r"\1", "linear"),
    (r"temp", "temp/value", "copy"),
    (r"(image_queue|text_queue|idx_queue|queue_ptr)", r"\1", "queue"),
    (r"(prefix_ids|target_ids|bbox_prob_mask)", "location tokens of grounding", "constant"),
)

# {kind: {rest of the PyTorch key: (rests of our leaves, forward: array -> arrays, inverse: arrays, PyTorch shape -> array)}}.
_ONE = (lambda x: (x,), lambda parts, shape: parts[0])
_TRANSPOSED = (lambda x: (x.T,), lambda parts, shape: parts[0].T)
_QKV = ("/query/", "/key/", "/value/")
KINDS = {
    "copy": {"": (("",), *_ONE)},
    "linear": {".weight": (("/kernel",), *_TRANSPOSED), ".bias": (("/bias",), *_ONE)},
    "norm": {".weight": (("/scale",), *_ONE), ".bias": (("/bias",), *_ONE)},
    # Convolution weight [out, 3, p, p] <-> matrix over flattened patches [p * p * 3, out].
    "patches": {"": (("",), lambda x: (x.transpose(2, 3, 1, 0).reshape(-1, len(x)),),
                     lambda parts, shape: parts[0].reshape(shape[2], shape[3], shape[1], shape[0]).transpose(3, 2, 0, 1))},
    "qkv": {"_weight": (tuple(f"{name}kernel" for name in _QKV), lambda x: tuple(part.T for part in np.split(x, 3)),
                        lambda parts, shape: np.concatenate([part.T for part in parts])),
            "_bias": (tuple(f"{name}bias" for name in _QKV), lambda x: tuple(np.split(x, 3)),
                      lambda parts, shape: np.concatenate(parts))},
}
_COMPILED = tuple(
    (re.compile(regex + "(?P<rest>" + "|".join(map(re.escape, KINDS.get(kind, [""]))) + ")"), target, kind)
    for regex, target, kind in TABLE)


class Entry(NamedTuple):
  """What one PyTorch tensor is to us.

  action: "map" (parameter), "dead" (never run), "tied" (the same tensor as another key), "constant" or "queue".
  target: of map: paths of our leaves; otherwise a text: why, which key, what.
  index: place on the leaves' depth axis, or None. forward: array -> one array per leaf. inverse: (arrays, PyTorch shape) -> array.
  """
  action: str
  target: tuple | str
  index: int | None = None
  forward: object = None
  inverse: object = None


class Converter:
  """The table for one model."""

  def __init__(self, keys, geometry):
    """keys: PyTorch names of the online weights. geometry: fields of MPlug (fusion_layers, stride, fusion are read)."""
    self._connected = connected_layers(geometry["fusion_layers"], geometry["stride"], geometry.get("fusion", "released"))
    stored = [int(m[1]) for key in keys if (m := re.match(r"fusion_encoder\.encoder\.layer\.(\d+)\.", key))]
    self._first = max(stored, default=-1) + 1 - geometry["fusion_layers"]

  def entry(self, key):
    """PyTorch name of an online weight -> Entry.

    Raises:
      KeyError: the key does not match exactly one row of the table.
    """
    rows = [(m, target, kind) for regex, target, kind in _COMPILED if (m := regex.fullmatch(key))]
    if len(rows) != 1:
      raise KeyError(f"PyTorch tensor {key!r} matches {len(rows)} rows of the conversion table, it should match exactly one.")
    match, target, kind = rows[0]
    target = match.expand(target)
    if kind not in KINDS:
      return Entry(kind, target)
    if layer := re.search(r"<(\d+)>", target):
      j = int(layer[1]) - self._first
      if j < 0:
        return Entry("dead", "a stored fusion layer that never runs")  # docs/official.md item 4
      if j in self._connected and "/crossattention" in target:
        return Entry("dead", "the cross-attention of a connected layer, never run")  # item 2
      target = target.replace(layer[0], str(j))
    depth = re.search(r"\[(\d+)\]", target)
    target, index = (target.replace(depth[0], ""), int(depth[1])) if depth else (target, None)
    rests, forward, inverse = KINDS[kind][match["rest"]]
    return Entry("map", tuple(target + rest for rest in rests), index, forward, inverse)

  def pieces(self, key, array):
    """One PyTorch tensor -> [(path of ours, index on its depth axis or None, array)]; [] for what is no parameter.

    Raises:
      KeyError: see `entry`.
    """
    entry = self.entry(key)
    if entry.action != "map":
      return []
    return [(path, entry.index, part) for path, part in zip(entry.target, entry.forward(np.asarray(array)), strict=True)]


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
  params = jax.eval_shape(lambda: model.init(
      jax.random.key(0), jnp.zeros((1, size, size, 3)), jnp.zeros((1, 1), jnp.int32), method=everything))["params"]
  return {path: x.shape for path, x in traverse_util.flatten_dict(params, sep="/").items()}


def module_of(path):
  """The part of the model that a leaf belongs to; a checkpoint holds all of a part or nothing."""
  return "/".join(path.split("/")[:2]) if path.startswith("fusion_encoder/mlm_head") else path.split("/")[0]


def _refuse(problems):
  """Raises one ValueError that counts and groups what is wrong; `problems` is {what: [names]}."""
  found = [f"{len(names)} {what}: {grouped(names, '/' if '/' in names[0] else '.')}" for what, names in problems.items() if names]
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
  problems = {"unknown tensors": [], "tensors of another shape": [], "leaves written twice": [], "leaves missing": []}
  for key, shape in shapes.items():
    try:
      entries[key] = entry = converter.entry(key)
    except KeyError:
      problems["unknown tensors"].append(key)
      continue
    if entry.action != "map":
      continue
    written.update((path, entry.index) for path in entry.target)
    if not _fits(entry, shape, expected):
      problems["tensors of another shape"].append(f"{key} {list(shape)}")
  slots = {(path, i) for path, shape in expected.items() for i in (range(shape[0]) if re.search(r"/(blocks|layers)/", path) else [None])}
  present = {module_of(path) for path, _ in written}
  name = lambda path, i: path if i is None else f"{path}[{i}]"  # noqa: E731
  problems["leaves written twice"] = [name(*slot) for slot, n in written.items() if n > 1]
  problems["leaves missing"] = [name(*slot) for slot in sorted(slots - written.keys(), key=str) if module_of(slot[0]) in present]
  if any(key.startswith("fusion_encoder.") for key in shapes) and "fusion_encoder" not in present:
    problems["leaves missing"].append("fusion_encoder")
  _refuse(problems)
  return entries


def _fits(entry, shape, expected):
  """Whether a tensor of `shape` gives leaves (or slices of stacked ones) of the expected shapes."""
  try:
    parts = entry.forward(np.broadcast_to(np.float32(0.0), shape))  # one number, seen as a whole tensor
  except (ValueError, TypeError):
    return False
  for path, part in zip(entry.target, parts, strict=True):
    leaf = expected.get(path)
    if leaf is None or part.shape != (leaf if entry.index is None else leaf[1:]):
      return False
    if entry.index is not None and entry.index >= leaf[0]:
      return False
  return True


def params_from_torch(state_dict, geometry, momentum=False, dtype=None):
  """Official mPLUG state dict -> parameters of `MPlug`; one tensor at a time is in memory besides the result.

  Args:
    state_dict: {PyTorch key: array}, names as `convert_names.official_name` makes them; may read its arrays when asked.
    geometry: fields of MPlug.
    momentum: take the momentum copies (`text_encoder_m...`) instead of the online weights.
    dtype: of the result; None: for each leaf the one that holds its tensors' without loss.

  Returns:
    Nested dict of arrays, ready for `model.apply({"params": ...})`, of the parts that the state dict has.

  Raises:
    ValueError: tensors that do not fit the model, see `plan`, or two names of one tensor with different values.
  """
  keys = online_names(state_dict, momentum)
  shape_of = getattr(state_dict, "shape", lambda name: state_dict[name].shape)  # of a file without reading it
  entries = plan({key: shape_of(source) for key, source in keys.items()}, geometry)
  shapes, leaves = leaf_shapes(geometry), {}
  for key, entry in entries.items():
    if entry.action == "tied" and entry.target in keys and not np.array_equal(state_dict[keys[key]], state_dict[keys[entry.target]]):
      raise ValueError(f"{keys[key]} and {keys[entry.target]} are one tensor in the official model, but differ in these tensors.")
    if entry.action != "map":
      continue
    for path, part in zip(entry.target, entry.forward(np.asarray(state_dict[keys[key]])), strict=True):
      if path not in leaves:
        leaves[path] = np.empty(shapes[path], dtype or part.dtype)
      elif dtype is None and leaves[path].dtype != part.dtype:  # layers of one stack, stored differently
        leaves[path] = leaves[path].astype(jnp.promote_types(leaves[path].dtype, part.dtype))
      leaves[path][... if entry.index is None else entry.index] = part
  return traverse_util.unflatten_dict(leaves, sep="/")


def tensor_to_torch(entry, leaf, shape):
  """The inverse: one PyTorch tensor of `shape` from our leaves.

  Args:
    entry: of a key, with action "map". leaf: function path -> array, whole stacks.
  """
  parts = [np.asarray(leaf(path)) for path in entry.target]
  return np.ascontiguousarray(entry.inverse([part if entry.index is None else part[entry.index] for part in parts], shape)).reshape(shape)


def geometry_from_recording(meta):
  """The `meta` of arrays recorded from the official code (geometry, bert_config, config, ids) -> fields of MPlug."""
  geometry, bert = meta["geometry"], meta["bert_config"]
  return dict(
      image_size=geometry["image"], patch_size=geometry["patch"], vision_width=geometry["vision_width"],
      vision_layers=geometry["vision_layers"], vocab_size=bert["vocab_size"], hidden_size=bert["hidden_size"],
      heads=bert["num_attention_heads"], mlp_dim=bert["intermediate_size"], max_positions=bert["max_position_embeddings"],
      text_layers=meta.get("text_encoder_layers_kept", bert["text_encoder_layers"]), fusion_layers=bert["fusion_layers"],
      stride=bert["stride_layer"], decoder_layers=bert["text_decode_layers"], embed_dim=meta["config"]["embed_dim"],
      pad_id=bert["pad_token_id"])
