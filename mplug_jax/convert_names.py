"""Names of PyTorch tensors as they are found in files -> names of the official fine-tuning code, and the geometry they tell."""

import collections
import math
import re

from mplug_jax.models.presets import PRESETS

# (regex, replacement), applied to every name until none of them changes it.
_RULES = (
    (r"^(module|model)\.", ""),  # DistributedDataParallel, DeepSpeed, ModelScope
    (r"^(text_encoder|text_encoder_m)\.bert\.", r"\1."),
    (r"^(fusion_encoder|fusion_encoder_m)\.(fusion|bert)\.", r"\1."),  # two names of the pre-training model's core
)


def official_name(key):
  """One name of a file -> the official fine-tuning code's. It stays as it is when it is one already (docs/official.md item 18)."""
  while True:
    renamed = key
    for regex, replacement in _RULES:
      renamed = re.sub(regex, replacement, renamed)
    if renamed == key:
      return key
    key = renamed


def official_names(keys):
  """Names of a file -> {official name: name in the file}; a CLIP state dict's names get the image encoder's prefix.

  Raises:
    ValueError: two names mean the same tensor.
  """
  names = collections.defaultdict(list)
  keys = list(keys)
  clip = any(key.startswith("visual.") for key in map(official_name, keys))
  for key in keys:
    names["visual_encoder." * clip + official_name(key)].append(key)
  if twice := [found for found in names.values() if len(found) > 1]:
    raise ValueError(f"{len(twice)} tensors come under two names, for example {' and '.join(twice[0])}; keep one of each.")
  return {name: found[0] for name, found in names.items()}


def _layers(shapes, regex):
  """Number of layers whose names match the regex with the number as its group."""
  return 1 + max((int(m[1]) for name in shapes if (m := re.match(regex, name))), default=-1)


def infer_geometry(shapes, **given):
  """{official name: shape} -> fields of MPlug.

  What shapes do not tell: attention heads have 64 numbers, the last 6 stored fusion layers run, the stride is 6 for a model
  with a projection of the image tokens (large) and 3 for one without. Parts that are missing have the base model's sizes.

  Args:
    given: fields that are known better.

  Raises:
    ValueError: there is no image encoder and no text part.
  """
  g = {"embed_dim": 256, "pad_id": 0} | PRESETS["base"]
  visual = "visual_encoder.visual."
  if visual + "class_embedding" in shapes:
    patch = shapes[visual + "conv1.weight"][-1]
    g |= {"vision_width": shapes[visual + "class_embedding"][0], "patch_size": patch,
          "image_size": math.isqrt(shapes[visual + "positional_embedding"][0] - 1) * patch,
          "vision_layers": _layers(shapes, r"visual_encoder\.visual\.transformer\.resblocks\.(\d+)\.")}
  parts = ("text_decoder.bert", "text_encoder", "fusion_encoder")
  bert = next((b for b in parts if f"{b}.embeddings.word_embeddings.weight" in shapes), None)
  if bert:
    vocab, hidden = shapes[f"{bert}.embeddings.word_embeddings.weight"]
    g |= {"vocab_size": vocab, "hidden_size": hidden, "heads": max(1, hidden // 64),
          "max_positions": shapes[f"{bert}.embeddings.position_embeddings.weight"][0],
          "mlp_dim": next(shape[0] for name, shape in shapes.items() if re.match(r"text_\w+\..*\.intermediate\.dense\.weight", name))}
  if bert is None and visual + "class_embedding" not in shapes:
    raise ValueError("These tensors are no mPLUG and no CLIP: neither an image encoder nor a BERT part is among them.")
  for field, regex in (("text_layers", r"text_encoder\.encoder\.layer\.(\d+)\."),
                       ("decoder_layers", r"text_decoder\.bert\.encoder\.layer\.(\d+)\.")):
    g[field] = _layers(shapes, regex) or g[field]
  stored = _layers(shapes, r"fusion_encoder\.encoder\.layer\.(\d+)\.")
  g["fusion_layers"] = min(g["fusion_layers"], stored or g["fusion_layers"])
  g["stride"] = 6 if "visn_fc.weight" in shapes else 3
  if "vision_proj.weight" in shapes:
    g["embed_dim"] = shapes["vision_proj.weight"][0]
  return g | given
