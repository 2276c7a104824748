"""What each PyTorch tensor is to us: a table for every source, read in both directions.

A row of TABLES is (regex on the whole PyTorch key, target, kind), keys named as `convert_names.official_names` names them.
For kinds of KINDS the target is a path of ours: `\\1` is the regex's group, `[\\1]` an index on a leading depth axis, `<\\1>`
a fusion layer, counted as the source counts. A tuple of targets: one tensor that several leaves start from, those of them
that the model has; the way back reads the first. For other kinds the target says what the tensor is instead of a parameter.
"""

import re

import numpy as np

_BERT_LAYER = (
  (r"attention\.self\.(query|key|value)", r"attention/\2", "linear"),
  (r"attention\.output\.dense", r"attention/out", "linear"),
  (r"attention\.output\.LayerNorm", r"attention_norm", "norm"),
  (r"intermediate\.dense", r"intermediate", "linear"),
  (r"output\.dense", r"output", "linear"),
  (r"output\.LayerNorm", r"output_norm", "norm"),
)
_BERT_CROSS = (
  (r"crossattention\.self\.(query|key|value)", r"crossattention/\2", "linear"),
  (r"crossattention\.output\.dense", r"crossattention/out", "linear"),
  (r"crossattention\.output\.LayerNorm", r"crossattention_norm", "norm"),
)


def _bert_layers(prefix, *paths, rows=_BERT_LAYER):
  return tuple(
    (rf"{prefix}\.encoder\.layer\.(\d+)\.{key}", tuple(f"{path}/{ours}" for path in paths), kind)
    for key, ours, kind in rows
  )


def _embeddings(prefix, *paths, words=()):
  """words: further targets of the word table."""
  tables = {
    name: tuple(f"{path}/embeddings/{name}/embedding" for path in paths)
    for name in ("word", "position", "token_type")
  }
  tables["word"] += words
  return (
    *(
      (rf"{prefix}\.embeddings\.{name}_embeddings\.weight", targets, "copy")
      for name, targets in tables.items()
    ),
    (
      rf"{prefix}\.embeddings\.LayerNorm",
      tuple(f"{path}/embeddings/norm" for path in paths),
      "norm",
    ),
    (rf"{prefix}\.embeddings\.position_ids", "0, 1, 2, ...", "constant"),
  )


def _head(prefix, *paths):
  return (
    (prefix + r"\.transform\.dense", tuple(f"{path}/dense" for path in paths), "linear"),
    (prefix + r"\.transform\.LayerNorm", tuple(f"{path}/norm" for path in paths), "norm"),
    (prefix + r"\.bias", tuple(f"{path}/bias" for path in paths), "copy"),
    (prefix + r"\.decoder\.bias", prefix.replace("\\", "") + ".bias", "tied"),
  )


_VISUAL = r"visual_encoder\.visual"
_BLOCK = _VISUAL + r"\.transformer\.resblocks\.(\d+)"
MPLUG = (  # and OpenAI's CLIP and open_clip, whose names are the image encoder's
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
  (
    r"visual_encoder\.(input_resolution|context_length|vocab_size)",
    "CLIP's own sizes, never used",
    "dead",
  ),
  (
    r"visual_encoder\.(?!visual\.|input_resolution$|context_length$|vocab_size$).*",
    "CLIP's text tower, never run",
    "dead",
  ),
  (r"visn_fc", "visn_fc", "linear"),
  (r"visn_layer_norm", "visn_layer_norm", "norm"),
  *_embeddings("text_encoder", "text_encoder"),
  *_bert_layers("text_encoder", r"text_encoder/layers[\1]", rows=_BERT_LAYER + _BERT_CROSS),
  (r"(text_encoder|fusion_encoder)\.pooler\..*", "BERT's pooler, never run", "dead"),
  (r"fusion_encoder\.embeddings\.position_ids", "0, 1, 2, ...", "constant"),
  (
    r"fusion_encoder\.embeddings\.(?!position_ids).*",
    "the fusion encoder's embeddings, never run",
    "dead",
  ),
  *_bert_layers("fusion_encoder", r"fusion_encoder/layer_<\1>", rows=_BERT_LAYER + _BERT_CROSS),
  *_head(r"fusion_encoder\.cls\.predictions", "fusion_encoder/mlm_head/head"),
  (
    r"fusion_encoder\.cls\.predictions\.decoder\.weight",
    "fusion_encoder/mlm_head/word/embedding",
    "copy",
  ),
  *_embeddings(r"text_decoder\.bert", "text_decoder"),
  *_bert_layers(r"text_decoder\.bert", r"text_decoder/layers[\1]", rows=_BERT_LAYER + _BERT_CROSS),
  *_head(r"text_decoder\.cls\.predictions", "text_decoder/head"),
  (
    r"text_decoder\.cls\.predictions\.decoder\.weight",
    "text_decoder.bert.embeddings.word_embeddings.weight",
    "tied",
  ),
  (r"(vision_proj|text_proj|itm_head)", r"\1", "linear"),
  (r"temp", "temp/value", "copy"),
  (r"(image_queue|text_queue|idx_queue|queue_ptr)", r"\1", "queue"),
  (r"(prefix_ids|target_ids|bbox_prob_mask)", "location tokens of grounding", "constant"),
)

_LAYER = r"vision_model\.encoder\.layers\.(\d+)"
HUGGINGFACE_CLIP = (
  (r"vision_model\.embeddings\.class_embedding", "visual_encoder/class_embedding", "copy"),
  (
    r"vision_model\.embeddings\.position_embedding\.weight",
    "visual_encoder/position_embedding",
    "copy",
  ),
  (
    r"vision_model\.embeddings\.patch_embedding\.weight",
    "visual_encoder/patch_embed/kernel",
    "patches",
  ),
  (r"vision_model\.embeddings\.position_ids", "0, 1, 2, ...", "constant"),
  (r"vision_model\.pre_layrnorm", "visual_encoder/ln_pre", "norm"),  # spelt so
  (r"vision_model\.post_layernorm", "visual_encoder/ln_post", "norm"),
  *(
    (
      _LAYER + rf"\.self_attn\.{name[0]}_proj",
      rf"visual_encoder/blocks[\1]/attention/{name}",
      "linear",
    )
    for name in ("query", "key", "value")
  ),
  (_LAYER + r"\.self_attn\.out_proj", r"visual_encoder/blocks[\1]/attention/out", "linear"),
  (_LAYER + r"\.layer_norm(1|2)", r"visual_encoder/blocks[\1]/ln_\2", "norm"),
  (_LAYER + r"\.mlp\.fc1", r"visual_encoder/blocks[\1]/mlp/up", "linear"),
  (_LAYER + r"\.mlp\.fc2", r"visual_encoder/blocks[\1]/mlp/down", "linear"),
  (r"text_model\.embeddings\.position_ids", "0, 1, 2, ...", "constant"),
  (r"text_model\.(?!embeddings\.position_ids$).*", "CLIP's text tower, never run", "dead"),
  (
    r"(visual_projection\.weight|text_projection\.weight|logit_scale)",
    "CLIP's own projection, never used",
    "dead",
  ),
)

# The official start of pre-training: the text encoder takes the first layers, the fusion encoder the next, the decoder all.
BERT = (
  *_embeddings(
    "bert", "text_encoder", "text_decoder", words=("fusion_encoder/mlm_head/word/embedding",)
  ),
  *_bert_layers(
    "bert", r"text_encoder/layers[\1]", r"fusion_encoder/layer_<\1>", r"text_decoder/layers[\1]"
  ),
  *_head(r"cls\.predictions", "text_decoder/head", "fusion_encoder/mlm_head/head"),
  (r"cls\.predictions\.decoder\.weight", "bert.embeddings.word_embeddings.weight", "tied"),
  (r"bert\.pooler\..*", "BERT's pooler, never run", "dead"),
  (r"cls\.seq_relationship\..*", "BERT's next sentence head, never run", "dead"),
)
# Regexes of leaves that BERT has no numbers for.
BERT_LEAVES_NEW = (r"(fusion_encoder|text_decoder)/.*crossattention(_norm)?/.*",)
HEADLESS_BERT_LEAVES_NEW = (*BERT_LEAVES_NEW, r"text_decoder/head/.*")

TABLES = {"mplug": MPLUG, "huggingface_clip": HUGGINGFACE_CLIP, "bert": BERT}
_SIGNS = {"bert.": "bert", "vision_model.": "huggingface_clip"}

# {kind: {rest of the PyTorch key: (rests of our leaves, forward: array -> arrays, inverse: arrays, PyTorch shape -> array)}}.
_ONE = (lambda x: (x,), lambda parts, shape: parts[0])
_TRANSPOSED = (lambda x: (x.T,), lambda parts, shape: parts[0].T)
_QKV = ("/query/", "/key/", "/value/")
KINDS = {
  "copy": {"": (("",), *_ONE)},
  "linear": {".weight": (("/kernel",), *_TRANSPOSED), ".bias": (("/bias",), *_ONE)},
  "norm": {".weight": (("/scale",), *_ONE), ".bias": (("/bias",), *_ONE)},
  # Convolution weight [out, 3, p, p] <-> matrix over flattened patches [p * p * 3, out].
  "patches": {
    "": (
      ("",),
      lambda x: (x.transpose(2, 3, 1, 0).reshape(-1, len(x)),),
      lambda parts, shape: (
        parts[0].reshape(shape[2], shape[3], shape[1], shape[0]).transpose(3, 2, 0, 1)
      ),
    )
  },
  "qkv": {
    "_weight": (
      tuple(f"{name}kernel" for name in _QKV),
      lambda x: tuple(part.T for part in np.split(x, 3)),
      lambda parts, shape: np.concatenate([part.T for part in parts]),
    ),
    "_bias": (
      tuple(f"{name}bias" for name in _QKV),
      lambda x: tuple(np.split(x, 3)),
      lambda parts, shape: np.concatenate(parts),
    ),
  },
}
_COMPILED = {
  source: tuple(
    (
      re.compile(regex + "(?P<rest>" + "|".join(map(re.escape, KINDS.get(kind, [""]))) + ")"),
      target,
      kind,
    )
    for regex, target, kind in table
  )
  for source, table in TABLES.items()
}


def source_of(keys):
  """Official names -> the key of TABLES: whose names they are, the official model's unless a prefix says otherwise."""
  return next(
    (source for prefix, source in _SIGNS.items() if any(key.startswith(prefix) for key in keys)),
    "mplug",
  )


def find(source, key):
  """(Key of TABLES, PyTorch name) -> (targets, or the text that says what it is; kind; rest of the name after the row's regex).

  Raises:
    KeyError: the name does not match exactly one row.
  """
  rows = [
    (m, target, kind) for regex, target, kind in _COMPILED[source] if (m := regex.fullmatch(key))
  ]
  if len(rows) != 1:
    raise KeyError(
      f"PyTorch tensor {key!r} matches {len(rows)} rows of the conversion table, it should match exactly one."
    )
  match, target, kind = rows[0]
  if kind not in KINDS:
    return match.expand(target), kind, ""
  return (
    tuple(map(match.expand, (target,) if isinstance(target, str) else target)),
    kind,
    match["rest"],
  )
