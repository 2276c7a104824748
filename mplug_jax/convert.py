"""PyTorch mPLUG state dict -> our parameters, by one table.

Each row of TABLE is (regex on the whole PyTorch key, path of ours, kind). `\\1` in the path is the regex's group; `[\\1]`
stacks on a leading depth axis; `<\\1>` is a stored fusion layer, counted from the first one that runs. A key that matches no
row, a leaf made twice or a hole in a stack is an error: nothing is dropped silently.
"""

import re

from flax import traverse_util
import numpy as np

from mplug_jax.models.fusion import connected_layers

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
          (rf"{prefix}\.embeddings\.position_ids", "", "drop"))


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
    # Dead weight: CLIP's own projection and its text tower are stored, never used (docs/official.md item 42).
    (_VISUAL + r"\.proj", "", "drop"),
    (r"visual_encoder\.(?!visual\.).*", "", "drop"),
    (r"visn_fc", "visn_fc", "linear"),
    (r"visn_layer_norm", "visn_layer_norm", "norm"),
    *_embeddings("text_encoder", "text_encoder"),
    *_bert_layers("text_encoder", r"text_encoder/layers[\1]"),
    (r"fusion_encoder\.embeddings\..*", "", "drop"),
    *_bert_layers("fusion_encoder", r"fusion_encoder/layer_<\1>"),
    *_embeddings(r"text_decoder\.bert", "text_decoder"),
    *_bert_layers(r"text_decoder\.bert", r"text_decoder/layers[\1]"),
    (r"text_decoder\.cls\.predictions\.transform\.dense", "text_decoder/head/dense", "linear"),
    (r"text_decoder\.cls\.predictions\.transform\.LayerNorm", "text_decoder/head/norm", "norm"),
    (r"text_decoder\.cls\.predictions\.bias", "text_decoder/head/bias", "copy"),
    (r"text_decoder\.cls\.predictions\.decoder\.(weight|bias)", "", "drop"),  # tied: stored under two names
    (r"(vision_proj|text_proj|itm_head)", r"\1", "linear"),
    (r"temp", "temp/value", "copy"),
    # Buffers of single tasks, not parameters.
    (r"(image_queue|text_queue|idx_queue|queue_ptr|prefix_ids|target_ids|bbox_prob_mask)", "", "drop"),
)

# Kinds that read "<key>.weight" and "<key>.bias": our leaf names and what is done to the array.
_PAIRS = {
    "linear": {".weight": ("/kernel", np.transpose), ".bias": ("/bias", None)},
    "norm": {".weight": ("/scale", None), ".bias": ("/bias", None)},
}


def _patches_kernel(kernel):
  """Convolution weight [out, 3, p, p] -> matrix over flattened patches [p * p * 3, out]."""
  return kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])


def _leaves(key, target, kind, suffix, array):
  """One PyTorch tensor -> [(path, array)] of ours."""
  if kind == "drop":
    return []
  if kind == "copy":
    return [(target, array)]
  if kind == "patches":
    return [(target, _patches_kernel(array))]
  if kind == "qkv":
    leaf = {"_weight": "kernel", "_bias": "bias"}[suffix]
    return [(f"{target}/{name}/{leaf}", part.T) for name, part in zip(("query", "key", "value"), np.split(array, 3))]
  leaf, change = _PAIRS[kind][suffix]
  return [(target + leaf, change(array) if change else array)]


def _suffixes(kind):
  return {"linear": r"(?P<suffix>\.weight|\.bias)", "norm": r"(?P<suffix>\.weight|\.bias)",
          "qkv": r"(?P<suffix>_weight|_bias)"}.get(kind, "(?P<suffix>)")


_COMPILED = tuple((re.compile(regex + _suffixes(kind)), path, kind) for regex, path, kind in TABLE)


def _match(key):
  rows = [(m, path, kind) for regex, path, kind in _COMPILED if (m := regex.fullmatch(key))]
  if len(rows) != 1:
    raise ValueError(f"PyTorch tensor {key!r} matches {len(rows)} rows of the conversion table, it should match exactly one.")
  return rows[0]


class Converter:
  """The table applied to one model's tensors."""

  def __init__(self, keys, geometry):
    """keys: PyTorch names of the online weights. geometry: fields of MPlug (fusion_layers, stride, fusion are read)."""
    self._connected = connected_layers(geometry["fusion_layers"], geometry["stride"], geometry.get("fusion", "released"))
    stored = [int(m[1]) for key in keys if (m := re.match(r"fusion_encoder\.encoder\.layer\.(\d+)\.", key))]
    self._first = max(stored, default=-1) + 1 - geometry["fusion_layers"]

  def pieces(self, key, array):
    """One PyTorch tensor -> [(path of ours, index on its depth axis or None, array)]; [] for dead weight.

    Raises:
      ValueError: the key matches no row of the table, or several.
    """
    match, path, kind = _match(key)
    target = match.expand(path)
    if layer := re.search(r"<(\d+)>", target):
      j = int(layer[1]) - self._first
      if j < 0 or (j in self._connected and "/crossattention" in target):
        return []  # never run (docs/official.md items 2 and 4)
      target = target.replace(layer[0], str(j))
    depth = re.search(r"\[(\d+)\]", target)
    target, index = (target.replace(depth[0], ""), int(depth[1])) if depth else (target, None)
    return [(name, index, x) for name, x in _leaves(key, target, kind, match["suffix"], np.asarray(array))]


def online_names(state_dict, momentum=False):
  """{PyTorch name of the online weight: key in the state dict}, of the online weights or of their momentum copies."""
  copy = re.compile(r"^(\w+)_m(\.|$)")
  return {copy.sub(r"\1\2", key): key for key in state_dict if bool(copy.match(key)) == momentum}


def params_from_torch(state_dict, geometry, momentum=False):
  """Official mPLUG state dict -> parameters of `MPlug`.

  Args:
    state_dict: {PyTorch key: array}, names as in the released models.
    geometry: fields of MPlug.
    momentum: take the momentum copies (`text_encoder_m...`) instead of the online weights.

  Returns:
    Nested dict of arrays, ready for `model.apply({"params": ...})`.

  Raises:
    ValueError: an unknown key, a leaf made twice, or layers that are not those of `geometry`.
  """
  keys = online_names(state_dict, momentum)
  converter = Converter(keys, geometry)
  stacks = {}
  for key, source in keys.items():
    for name, index, array in converter.pieces(key, state_dict[source]):
      stack = stacks.setdefault(name, {})
      if index in stack:
        raise ValueError(f"PyTorch tensor {key!r} writes {name} a second time.")
      stack[index] = array
  fusion = {int(m[1]) for name in stacks if (m := re.match(r"fusion_encoder/layer_(\d+)/", name))}
  _check_layers("fusion_encoder", fusion or range(geometry["fusion_layers"]), geometry["fusion_layers"])
  return traverse_util.unflatten_dict({name: _stacked(name, stack, geometry) for name, stack in stacks.items()}, sep="/")


_DEPTHS = {"visual_encoder": "vision_layers", "text_encoder": "text_layers", "text_decoder": "decoder_layers"}


def _stacked(name, stack, geometry):
  """{None: array} -> the array; {0: ..., 1: ...} -> one array with a leading depth axis."""
  if list(stack) == [None]:
    return stack[None]
  depth = geometry[_DEPTHS[name.split("/")[0]]]
  _check_layers(name, stack, depth)
  return np.stack([stack[i] for i in range(depth)])


def _check_layers(name, found, depth):
  if sorted(found) != list(range(depth)):
    raise ValueError(f"{name}: the state dict has layers {', '.join(map(str, sorted(found)))}, the model needs 0 to {depth - 1}.")


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
