"""Tensors of the official PyTorch models: names, shapes, dtypes, and values of non-parameters."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

TASKS = ("vqa", "caption", "retrieval", "grounding", "videocap")
LOCATION_BINS = 336
QUEUE = 65536  # columns of the contrastive queues


class Tensor(NamedTuple):
  """Shape and NumPy dtype name of a tensor."""

  shape: tuple[int, ...]
  dtype: str = "float32"


Tensors = dict[str, Tensor]  # {PyTorch name: Tensor}


class ClipText(NamedTuple):
  """Geometry of CLIP's text tower, stored in official checkpoints; defaults: ViT-B/16."""

  width: int = 512
  layers: int = 12
  embed: int = 512
  context: int = 77
  vocab: int = 49408


def clip_text(vision_width: int) -> ClipText:
  """Returns the text tower released with an image encoder of this width."""
  return ClipText(width=768, embed=768) if vision_width == 1024 else ClipText()


def _pair(name: str, out: int, *rest: int) -> Tensors:
  return {f"{name}.weight": Tensor((out, *rest)), f"{name}.bias": Tensor((out,))}


def _clip_blocks(prefix: str, layers: int, width: int) -> Tensors:
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


def _clip(prefix: str, g: Mapping[str, Any], text: ClipText) -> Tensors:
  width = g["vision_width"]
  patch = g["patch_size"]
  visual = f"{prefix}.visual"
  tokens = (g["image_size"] // patch) ** 2 + 1
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


def _attention(prefix: str, width: int) -> Tensors:
  return {
    **{
      k: v
      for name in ("query", "key", "value")
      for k, v in _pair(f"{prefix}.self.{name}", width, width).items()
    },
    **_pair(f"{prefix}.output.dense", width, width),
    **_pair(f"{prefix}.output.LayerNorm", width),
  }


def _bert(prefix: str, g: Mapping[str, Any], layers: int, cross: bool) -> Tensors:
  width = g["hidden_size"]
  mlp = g["mlp_dim"]
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


def _decoder(prefix: str, g: Mapping[str, Any]) -> Tensors:
  width = g["hidden_size"]
  head = f"{prefix}.cls.predictions"
  return {
    **_bert(f"{prefix}.bert", g, g["decoder_layers"], cross=True),
    f"{head}.bias": Tensor((g["vocab_size"],)),
    **_pair(f"{head}.transform.dense", width, width),
    **_pair(f"{head}.transform.LayerNorm", width),
    **_pair(f"{head}.decoder", g["vocab_size"], width),
  }


def _modules(
  g: Mapping[str, Any], text: ClipText, stored_fusion_layers: int
) -> dict[str, Callable[[str], Tensors]]:
  """Returns {module: function suffix -> its tensors}; "_m" is the suffix of momentum copies."""
  width = g["hidden_size"]
  embed = g["embed_dim"]
  modules: dict[str, Callable[[str], Tensors]] = {
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


def inventory(
  task: str,
  geometry: Mapping[str, Any],
  text: ClipText | None = None,
  stored_fusion_layers: int = 12,
  queue: int = QUEUE,
) -> Tensors:
  """Returns {PyTorch name: Tensor} of the official model of a task.

  Args:
    task: one of TASKS.
    geometry: fields of MPlug.
    text: CLIP's text tower; None for the one released with this image encoder.
    stored_fusion_layers: fusion layers in the state dict, of which the last `fusion_layers` run.
    queue: columns of the contrastive queues.

  Raises:
    ValueError: the task is unknown.
  """
  if task not in TASKS:
    raise ValueError(
      f"There is no official model for the task {task!r}, only for {', '.join(TASKS)}."
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


# ---- values of tensors that are no parameters


def constant(name: str, tensor: Tensor, first_location_id: int = 345) -> np.ndarray:
  """Returns the value of a tensor whose table entry is "constant".

  Args:
    name: PyTorch name.
    tensor: its shape and dtype.
    first_location_id: vocabulary id of grounding's first location token; the prefix token has the
      id before it.
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


# Standard deviations of CLIP's initialization, from the width and depth of the tower. Other
# matrices have BERT's 0.02; norms are 1, biases 0.
_CLIP_STD: tuple[tuple[str, Callable[[int, int], float]], ...] = (
  (r"positional_embedding", lambda width, layers: 0.01 if layers else width**-0.5),
  (r"(visual\.proj|text_projection)", lambda width, layers: width**-0.5),
  (r"in_proj_weight", lambda width, layers: width**-0.5),
  (r"(out_proj|c_proj)\.weight", lambda width, layers: width**-0.5 * (2 * layers) ** -0.5),
  (r"c_fc\.weight", lambda width, layers: (2 * width) ** -0.5),
)


def initial(name: str, tensor: Tensor, rng: np.random.Generator, layers: int = 12) -> np.ndarray:
  """Returns the value by the official initialization, for a tensor that is stored but never run.

  Args:
    name: PyTorch name.
    tensor: its shape and dtype.
    rng: source of the random values.
    layers: depth of CLIP's text tower.
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
