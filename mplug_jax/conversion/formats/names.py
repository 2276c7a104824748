"""Names of PyTorch tensors as they are found in files -> names of the conversion tables, and the geometry they tell."""

import collections
import json
import math
import pathlib
import re

from mplug_jax.config.presets import PRESETS

# (regex, replacement), applied to every name until none of them changes it.
_RULES = (
  (r"^(module|model)\.", ""),  # DistributedDataParallel, DeepSpeed, ModelScope
  (r"^(text_encoder|text_encoder_m)\.bert\.", r"\1."),
  (
    r"^(fusion_encoder|fusion_encoder_m)\.(fusion|bert)\.",
    r"\1.",
  ),  # two names of the pre-training model's core
  (r"\bLayerNorm\.gamma$", "LayerNorm.weight"),  # BERT's first releases
  (r"\bLayerNorm\.beta$", "LayerNorm.bias"),
)

# {source: (what it is, regex of names that only it has, (regex, what the table's names have before it))}. Transformers
# saves BertModel and CLIPVisionModel without the prefix that they have inside larger models.
_SOURCES = {
  "mplug": (
    "mPLUG (visual_encoder..., text_encoder..., fusion_encoder..., text_decoder...)",
    r"(visual_encoder|text_encoder|fusion_encoder|text_decoder)(_m)?\.",
    (r"", ""),
  ),
  "clip": ("OpenAI's CLIP or open_clip (visual...)", r"visual\.", (r"", "visual_encoder.")),
  "huggingface_clip": (
    "Hugging Face's CLIP (vision_model...)",
    r"vision_model\.|encoder\.layers\.|embeddings\.(class|patch)_embedding",
    (r"(embeddings|encoder|pre_layrnorm|post_layernorm)\.", "vision_model."),
  ),
  "bert": (
    "BERT (bert.encoder.layer..., or encoder.layer...)",
    r"bert\.|encoder\.layer\.|embeddings\.word_embeddings\.",
    (r"(embeddings|encoder|pooler)\.", "bert."),
  ),
}


def official_name(key):
  """One name of a file -> the official fine-tuning code's. It stays as it is when it is one already (docs/official.md item 18)."""
  while True:
    renamed = key
    for regex, replacement in _RULES:
      renamed = re.sub(regex, replacement, renamed)
    if renamed == key:
      return key
    key = renamed


def source_kind(names):
  """Whose tensors these are, by the names in the file: "mplug", "clip" (OpenAI's and open_clip), "huggingface_clip" or "bert".

  Names and shapes do not tell an activation: CLIP models of open_clip trained with the plain GELU look like OpenAI's, whose
  x * sigmoid(1.702 x) our image encoder computes, and are converted to a model that computes something else.

  Raises:
    ValueError: none of these, or several at once.
  """
  names = [official_name(name) for name in names]
  found = [
    kind for kind, (_, sign, _) in _SOURCES.items() if any(re.match(sign, name) for name in names)
  ]
  known = "; ".join(what for what, _, _ in _SOURCES.values())
  if not found:
    starts = sorted({name.split(".")[0] for name in names})
    raise ValueError(
      f"These tensors are no mPLUG and no CLIP or BERT: their names begin with {', '.join(starts[:8])}"
      f"{', ...' * (len(starts) > 8)}; convertible are {known}."
    )
  if len(found) > 1:
    raise ValueError(
      f"These tensors are of several models at once: {' and '.join(_SOURCES[kind][0] for kind in found)}; "
      "convert each from a file of its own."
    )
  return found[0]


def official_names(keys):
  """Names of a file -> {name of the conversion tables: name in the file}.

  The tables know the official mPLUG's names, CLIP's behind the image encoder's prefix, and Hugging Face's with theirs.

  Raises:
    ValueError: see `source_kind`, or two names mean the same tensor.
  """
  names, keys = collections.defaultdict(list), list(keys)
  regex, prefix = _SOURCES[source_kind(keys)][2]
  for key in keys:
    name = official_name(key)
    names[prefix + name if re.match(regex, name) else name].append(key)
  if twice := [found for found in names.values() if len(found) > 1]:
    raise ValueError(
      f"{len(twice)} tensors come under two names, for example {' and '.join(twice[0])}; keep one of each."
    )
  return {name: found[0] for name, found in names.items()}


_ACTIVATIONS = {"bert": "gelu", "clip": "quick_gelu"}


def config_beside(path):
  """What Hugging Face's config.json in the folder, or beside the file, says of heads: fields for `infer_geometry`, or {}.

  Args:
    path: file or folder of a checkpoint.

  Raises:
    ValueError: it cannot be read, or describes an activation that our layers do not compute.
  """
  path = pathlib.Path(path)
  file = (path if path.is_dir() else path.parent) / "config.json"
  try:
    config = json.loads(file.read_text(encoding="utf-8"))
    family = str(config.get("model_type")).partition("_")[0]  # clip, clip_vision_model
    if family not in _ACTIVATIONS:
      return {}
    config = config.get("vision_config") or config if family == "clip" else config
    heads, width = (
      config.get("num_attention_heads", 12),
      config.get("hidden_size", 768),
    )  # transformers' own defaults
    if type(heads) is not int or heads < 1 or type(width) is not int:
      raise ValueError(f"num_attention_heads {heads!r}, hidden_size {width!r}")
  except FileNotFoundError:
    return {}
  except (ValueError, TypeError, AttributeError, OSError, RecursionError) as error:
    raise ValueError(
      f"{file} is no configuration of a model ({type(error).__name__}: {error}); correct or rename it."
    ) from error
  activation = config.get("hidden_act", _ACTIVATIONS[family])
  if activation != _ACTIVATIONS[family]:
    raise ValueError(
      f"{file}: hidden_act is {activation!r}, our layers compute {_ACTIVATIONS[family]!r}: the converted model would not be "
      "this one; rename the file to convert it all the same."
    )
  if family == "bert":
    return {"heads": heads}
  return {} if heads * 64 == width else {"vision_heads": heads}


def _layers(shapes, regex):
  """Number of layers whose names match the regex with the number as its group."""
  count = 1 + max((int(m[1]) for name in shapes if (m := re.match(regex, name))), default=-1)
  if count > len(shapes):
    raise ValueError(
      f"The tensors' names number layers up to {count - 1}, but there are {len(shapes)} tensors; the file is damaged."
    )
  return count


def _shape(shapes, name, axes):
  """The shape of a tensor that tells the geometry."""
  if name not in shapes:
    raise ValueError(
      f"The tensor {name} is missing, which tells the model's geometry; get the complete file."
    )
  if len(shapes[name]) != axes:
    raise ValueError(
      f"The tensor {name} should have {axes} axes and has shape {list(shapes[name])}."
    )
  return shapes[name]


# Names by source of: class token, patch kernel, position table; regex of a block.
_VISION = (
  (
    "visual_encoder.visual.class_embedding",
    "visual_encoder.visual.conv1.weight",
    "visual_encoder.visual.positional_embedding",
    r"visual_encoder\.visual\.transformer\.resblocks\.(\d+)\.",
  ),
  (
    "vision_model.embeddings.class_embedding",
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.embeddings.position_embedding.weight",
    r"vision_model\.encoder\.layers\.(\d+)\.",
  ),
)


def _vision_geometry(shapes):
  for token, patches, positions, block in _VISION:
    if token in shapes:
      patch, tokens = _shape(shapes, patches, 4)[-1], _shape(shapes, positions, 2)[0]
      return {
        "vision_width": _shape(shapes, token, 1)[0],
        "patch_size": patch,
        "image_size": math.isqrt(max(tokens - 1, 0)) * patch,
        "vision_layers": _layers(shapes, block),
      }
  return {}


def _bert_geometry(shapes):
  parts = ("text_decoder.bert", "text_encoder", "fusion_encoder", "bert")
  bert = next((b for b in parts if f"{b}.embeddings.word_embeddings.weight" in shapes), None)
  if bert is None:
    return {}
  vocab, hidden = _shape(shapes, f"{bert}.embeddings.word_embeddings.weight", 2)
  feed_forward = next(
    (
      name for name in shapes if re.match(r"(text_\w+|bert)\..*\.intermediate\.dense\.weight", name)
    ),
    f"{bert}.encoder.layer.0.intermediate.dense.weight",
  )
  return {
    "vocab_size": vocab,
    "hidden_size": hidden,
    "heads": max(1, hidden // 64),
    "max_positions": _shape(shapes, f"{bert}.embeddings.position_embeddings.weight", 2)[0],
    "mlp_dim": _shape(shapes, feed_forward, 2)[0],
  }


def _depths(shapes, given):
  """Layers of the text parts; 0 where the source has none."""
  if layers := _layers(shapes, r"bert\.encoder\.layer\.(\d+)\."):
    text = given.get("text_layers", min(PRESETS["base"]["text_layers"], layers))
    return {"text_layers": text, "fusion_layers": max(layers - text, 0), "decoder_layers": layers}
  return {
    "text_layers": _layers(shapes, r"text_encoder\.encoder\.layer\.(\d+)\."),
    "fusion_layers": _layers(shapes, r"fusion_encoder\.encoder\.layer\.(\d+)\."),
    "decoder_layers": _layers(shapes, r"text_decoder\.bert\.encoder\.layer\.(\d+)\."),
  }


def infer_geometry(shapes, **given):
  """{name of the conversion tables: shape} -> fields of MPlug.

  What shapes do not tell: attention heads have 64 numbers, the last 6 stored fusion layers run, the stride is 6 for a model
  with a projection of the image tokens (large) and 3 for one without. Of a BERT the text encoder takes the first 6 layers
  (or text_layers), the fusion encoder up to 6 of the others, the decoder all. Parts that are missing have the base
  model's sizes.

  Args:
    given: fields that are known better; heads and vision_heads where they are not 64 wide (as in CLIP's ViT-H/14).

  Raises:
    ValueError: there is no image encoder and no text part, or a tensor that tells a size is missing, or heads do not fit.
  """
  vision, bert, base = _vision_geometry(shapes), _bert_geometry(shapes), PRESETS["base"]
  if not vision and not bert:
    raise ValueError(
      "These tensors are no mPLUG and no CLIP or BERT: neither an image encoder nor a BERT part is among them."
    )
  g = {"embed_dim": 256, "pad_id": 0} | base | vision | bert
  g |= {field: layers for field, layers in _depths(shapes, given).items() if layers}
  g["fusion_layers"] = min(g["fusion_layers"], base["fusion_layers"])
  g["stride"] = 6 if "visn_fc.weight" in shapes else 3
  if "vision_proj.weight" in shapes:
    g["embed_dim"] = shapes["vision_proj.weight"][0]
  g |= given
  for part, width, heads in (
    ("BERT", g["hidden_size"], g["heads"]),
    ("the image encoder", g["vision_width"], g.get("vision_heads") or 1),
  ):
    if heads < 1 or width % heads:
      raise ValueError(
        f"The width {width} of {part} does not divide into {heads} attention heads; give another number of heads."
      )
  return g
