"""Every tensor of the official PyTorch models: names, shapes, dtypes, and values for those that no parameter of ours fills."""

import math
import re
from typing import NamedTuple

import numpy as np

TASKS = ("vqa", "caption", "retrieval", "grounding", "videocap")
LOCATION_BINS = 336
QUEUE = 65536  # columns of the contrastive queues


class Tensor(NamedTuple):
  """shape of ints; dtype as numpy names it."""

  shape: tuple
  dtype: str = "float32"


class ClipText(NamedTuple):
  """Geometry of CLIP's text tower, which the official checkpoints carry along; that of ViT-B/16."""

  width: int = 512
  layers: int = 12
  embed: int = 512
  context: int = 77
  vocab: int = 49408


def clip_text(vision_width):
  """The text tower released with an image encoder of this width."""
  return ClipText(width=768, embed=768) if vision_width == 1024 else ClipText()


def _pair(name, out, *rest):
  return {f"{name}.weight": Tensor((out, *rest)), f"{name}.bias": Tensor((out,))}


def _clip_blocks(prefix, layers, width):
  tensors = {}
  for i in range(layers):
    block = f"{prefix}.transformer.resblocks.{i}"
    tensors |= {
      f"{block}.attn.in_proj_weight": Tensor((3 * width, width)),
      f"{block}.attn.in_proj_bias": Tensor((3 * width,)),
      **_pair(f"{block}.attn.out_proj", width, width),
      **_pair(f"{block}.ln_1", width),
      **_pair(f"{block}.mlp.c_fc", 4 * width, width),
      **_pair(f"{block}.mlp.c_proj", width, 4 * width),
      **_pair(f"{block}.ln_2", width),
    }
  return tensors


def _clip(prefix, g, text):
  width, patch = g["vision_width"], g["patch_size"]
  visual, tokens = f"{prefix}.visual", (g["image_size"] // patch) ** 2 + 1
  return {
    f"{prefix}.positional_embedding": Tensor((text.context, text.width)),
    f"{prefix}.text_projection": Tensor((text.width, text.embed)),
    f"{prefix}.logit_scale": Tensor(()),
    f"{visual}.class_embedding": Tensor((width,)),
    f"{visual}.positional_embedding": Tensor((tokens, width)),
    f"{visual}.proj": Tensor((width, text.embed)),
    f"{visual}.conv1.weight": Tensor((width, 3, patch, patch)),
    **_pair(f"{visual}.ln_pre", width),
    **_clip_blocks(visual, g["vision_layers"], width),
    **_pair(f"{visual}.ln_post", width),
    **_clip_blocks(prefix, text.layers, text.width),
    f"{prefix}.token_embedding.weight": Tensor((text.vocab, text.width)),
    **_pair(f"{prefix}.ln_final", text.width),
  }


def _attention(prefix, width):
  return {
    **{
      k: v
      for name in ("query", "key", "value")
      for k, v in _pair(f"{prefix}.self.{name}", width, width).items()
    },
    **_pair(f"{prefix}.output.dense", width, width),
    **_pair(f"{prefix}.output.LayerNorm", width),
  }


def _bert(prefix, g, layers, cross):
  width, mlp = g["hidden_size"], g["mlp_dim"]
  table = f"{prefix}.embeddings"
  tensors = {
    f"{table}.position_ids": Tensor((1, g["max_positions"]), "int64"),
    f"{table}.word_embeddings.weight": Tensor((g["vocab_size"], width)),
    f"{table}.position_embeddings.weight": Tensor((g["max_positions"], width)),
    f"{table}.token_type_embeddings.weight": Tensor((2, width)),
    **_pair(f"{table}.LayerNorm", width),
  }
  for i in range(layers):
    layer = f"{prefix}.encoder.layer.{i}"
    tensors |= {
      **_attention(f"{layer}.attention", width),
      **(_attention(f"{layer}.crossattention", width) if cross else {}),
      **_pair(f"{layer}.intermediate.dense", mlp, width),
      **_pair(f"{layer}.output.dense", width, mlp),
      **_pair(f"{layer}.output.LayerNorm", width),
    }
  return tensors


def _decoder(prefix, g):
  width, head = g["hidden_size"], f"{prefix}.cls.predictions"
  return {
    **_bert(f"{prefix}.bert", g, g["decoder_layers"], cross=True),
    f"{head}.bias": Tensor((g["vocab_size"],)),
    **_pair(f"{head}.transform.dense", width, width),
    **_pair(f"{head}.transform.LayerNorm", width),
    **_pair(f"{head}.decoder", g["vocab_size"], width),
  }


def _modules(g, text, stored_fusion_layers):
  """{name of a module: function suffix -> its tensors}, the suffix "_m" giving the momentum copy."""
  width, embed = g["hidden_size"], g["embed_dim"]
  modules = {
    "visual_encoder": lambda m: _clip(f"visual_encoder{m}", g, text),
    "text_encoder": lambda m: _bert(f"text_encoder{m}", g, g["text_layers"], cross=False),
    "fusion_encoder": lambda m: _bert(f"fusion_encoder{m}", g, stored_fusion_layers, cross=True),
    "text_decoder": lambda m: _decoder(f"text_decoder{m}", g),
    "visn": lambda m: {},
    "itm_head": lambda m: _pair(f"itm_head{m}", 2, width),
    "proj": lambda m: _pair(f"vision_proj{m}", embed, width) | _pair(f"text_proj{m}", embed, width),
  }
  if g["vision_width"] != width:
    modules["visn"] = lambda m: (
      _pair(f"visn_fc{m}", width, g["vision_width"]) | _pair(f"visn_layer_norm{m}", width)
    )
  return modules


# {task: (modules, those with a momentum copy)}
_PARTS = {
  "vqa": (
    "visual_encoder text_encoder fusion_encoder text_decoder visn",
    "visual_encoder text_encoder fusion_encoder text_decoder visn",
  ),
  "caption": ("visual_encoder text_encoder fusion_encoder text_decoder visn", ""),
  "retrieval": (
    "visual_encoder text_encoder fusion_encoder visn proj itm_head",
    "visual_encoder text_encoder fusion_encoder visn proj",
  ),
  "grounding": ("visual_encoder text_encoder fusion_encoder text_decoder visn proj", ""),
  "videocap": ("visual_encoder text_decoder visn", ""),
}


def inventory(task, geometry, text=None, stored_fusion_layers=12, queue=QUEUE):
  """{PyTorch name: Tensor} of the official model of `task`.

  Args:
    geometry: fields of MPlug. text: ClipText; None: the one released with this image encoder.
    stored_fusion_layers: fusion layers in the state dict, of which the last `fusion_layers` run.

  Raises:
    ValueError: an unknown task.
  """
  if task not in TASKS:
    raise ValueError(
      f"There is no official model of the task {task!r}; there are {', '.join(TASKS)}."
    )
  g = geometry
  modules = _modules(g, text or clip_text(g["vision_width"]), stored_fusion_layers)
  tensors = {}
  if task == "retrieval":
    tensors = {
      "temp": Tensor(()),
      "image_queue": Tensor((g["embed_dim"], queue)),
      "text_queue": Tensor((g["embed_dim"], queue)),
      "idx_queue": Tensor((1, queue), "int64"),
      "queue_ptr": Tensor((1,), "int64"),
    }
  if task == "grounding":
    tensors = {
      "prefix_ids": Tensor((1,), "int64"),
      "target_ids": Tensor((LOCATION_BINS + 1,), "int64"),
      "bbox_prob_mask": Tensor((g["vocab_size"],)),
    }
  for names, suffix in zip(_PARTS[task], ("", "_m"), strict=True):
    for name in names.split():
      tensors |= modules[name](suffix)
  return tensors


# ---- values of tensors that are no parameters of ours


def constant(name, tensor, first_location_id=345):
  """Value of a tensor whose table entry is "constant".

  Args:
    first_location_id: vocabulary id of the first location token of grounding; the prefix token is the one before.
  """
  if name.endswith("position_ids"):
    return np.arange(tensor.shape[1], dtype=np.int64)[None]
  locations = np.arange(first_location_id, first_location_id + LOCATION_BINS + 1, dtype=np.int64)
  if name == "prefix_ids":
    return locations[:1] - 1
  if name == "target_ids":
    return locations
  mask = np.full(tensor.shape, -10000.0, np.float32)
  mask[locations[locations < len(mask)]] = 0.0
  return mask


# Standard deviations of CLIP's initialisation; of the width and depth of the tower. Others are BERT's 0.02, norms 1, biases 0.
_CLIP_STD = (
  (r"positional_embedding", lambda width, layers: 0.01 if layers else width**-0.5),
  (r"(visual\.proj|text_projection)", lambda width, layers: width**-0.5),
  (r"in_proj_weight", lambda width, layers: width**-0.5),
  (r"(out_proj|c_proj)\.weight", lambda width, layers: width**-0.5 * (2 * layers) ** -0.5),
  (r"c_fc\.weight", lambda width, layers: (2 * width) ** -0.5),
)


def initial(name, tensor, rng, layers=12):
  """Value by the official initialisation, of a tensor that is stored but never run.

  Args:
    rng: numpy Generator. layers: depth of CLIP's text tower.
  """
  if name.endswith("logit_scale"):
    return np.array(math.log(1 / 0.07), np.float32)
  if re.search(r"(LayerNorm|ln_\w+)\.weight$", name):
    return np.ones(tensor.shape, np.float32)
  if name.endswith("bias"):
    return np.zeros(tensor.shape, np.float32)
  std = 0.02
  if name.startswith("visual_encoder"):
    width = (
      min(tensor.shape)
      if "c_" in name
      else tensor.shape[0]
      if "proj" in name and "in_proj" not in name
      else tensor.shape[-1]
    )
    std = next((f(width, layers) for regex, f in _CLIP_STD if re.search(regex + "$", name)), std)
  return (std * rng.standard_normal(tensor.shape, np.float32)).astype(tensor.dtype)
