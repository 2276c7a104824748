"""Small random BERT and CLIP state dicts, and by hand the parameters they give."""

import numpy as np

from mplug_jax.conversion import official_inventory

VOCAB, WIDTH, MLP, POSITIONS = 30, 64, 48, 12
VISION = dict(vision_width=64, vision_layers=2, patch_size=8, image_size=16)


def arrays(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def pair(name, out, *rest):
  return {f"{name}.weight": (out, *rest), f"{name}.bias": (out,)}


# ---- BERT


def bert(layers=8, head=True, seed=0):
  """Random tensors of BertForPreTraining, or of BertModel with the prefix of a larger model."""
  e, shapes = "bert.embeddings.", {}
  shapes |= {
    e + "word_embeddings.weight": (VOCAB, WIDTH),
    e + "position_embeddings.weight": (POSITIONS, WIDTH),
    e + "token_type_embeddings.weight": (2, WIDTH),
    **pair(e + "LayerNorm", WIDTH),
    **pair("bert.pooler.dense", WIDTH, WIDTH),
  }
  for i in range(layers):
    layer = f"bert.encoder.layer.{i}."
    for name in ("query", "key", "value"):
      shapes |= pair(f"{layer}attention.self.{name}", WIDTH, WIDTH)
    shapes |= {
      **pair(layer + "attention.output.dense", WIDTH, WIDTH),
      **pair(layer + "attention.output.LayerNorm", WIDTH),
      **pair(layer + "intermediate.dense", MLP, WIDTH),
      **pair(layer + "output.dense", WIDTH, MLP),
      **pair(layer + "output.LayerNorm", WIDTH),
    }
  if head:
    shapes |= {
      "cls.predictions.bias": (VOCAB,),
      **pair("cls.predictions.transform.dense", WIDTH, WIDTH),
      **pair("cls.predictions.transform.LayerNorm", WIDTH),
      **pair("cls.seq_relationship", 2, WIDTH),
    }
  tensors = arrays(shapes, seed) | {e + "position_ids": np.arange(POSITIONS)[None]}
  if head:
    tensors |= {
      "cls.predictions.decoder.weight": tensors[e + "word_embeddings.weight"],
      "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
    }
  return tensors


def layer_leaves(tensors, i):
  """{path below a layer: array} of BERT's layer i, by hand."""
  t = {name.removeprefix(f"bert.encoder.layer.{i}."): x for name, x in tensors.items()}
  leaves = {}
  for ours, theirs in (
    ("attention/query", "attention.self.query"),
    ("attention/key", "attention.self.key"),
    ("attention/value", "attention.self.value"),
    ("attention/out", "attention.output.dense"),
    ("intermediate", "intermediate.dense"),
    ("output", "output.dense"),
  ):
    leaves |= {f"{ours}/kernel": t[f"{theirs}.weight"].T, f"{ours}/bias": t[f"{theirs}.bias"]}
  for ours, theirs in (
    ("attention_norm", "attention.output.LayerNorm"),
    ("output_norm", "output.LayerNorm"),
  ):
    leaves |= {f"{ours}/scale": t[f"{theirs}.weight"], f"{ours}/bias": t[f"{theirs}.bias"]}
  return leaves


def bert_leaves(tensors, text, fusion, decoder, head=True):
  """Returns the parameters by hand: text and decoder layers from 0, then fusion layers."""
  leaves, e = {}, "bert.embeddings."
  for part, depth in (("text_encoder", text), ("text_decoder", decoder)):
    per_layer = [layer_leaves(tensors, i) for i in range(depth)]
    leaves |= {
      f"{part}/layers/{path}": np.stack([x[path] for x in per_layer]) for path in per_layer[0]
    }
    for name in ("word", "position", "token_type"):
      leaves[f"{part}/embeddings/{name}/embedding"] = tensors[f"{e}{name}_embeddings.weight"]
    leaves |= {
      f"{part}/embeddings/norm/scale": tensors[e + "LayerNorm.weight"],
      f"{part}/embeddings/norm/bias": tensors[e + "LayerNorm.bias"],
    }
  for j in range(fusion):
    leaves |= {
      f"fusion_encoder/layer_{j}/{path}": x for path, x in layer_leaves(tensors, text + j).items()
    }
  p = "cls.predictions."
  for path in (
    ("text_decoder/head", *(["fusion_encoder/mlm_head/head"] if fusion else [])) if head else ()
  ):
    leaves |= {
      f"{path}/dense/kernel": tensors[p + "transform.dense.weight"].T,
      f"{path}/dense/bias": tensors[p + "transform.dense.bias"],
      f"{path}/norm/scale": tensors[p + "transform.LayerNorm.weight"],
      f"{path}/norm/bias": tensors[p + "transform.LayerNorm.bias"],
      f"{path}/bias": tensors[p + "bias"],
    }
  if head and fusion:
    leaves["fusion_encoder/mlm_head/word/embedding"] = tensors[e + "word_embeddings.weight"]
  return leaves


# ---- CLIP


CLIP_TEXT = official_inventory.ClipText(width=16, layers=1, embed=8, context=5, vocab=11)


def clip(seed=1):
  """Random tensors of OpenAI's CLIP."""
  g = VISION | dict(
    vocab_size=1, hidden_size=8, mlp_dim=1, max_positions=1, decoder_layers=0, embed_dim=1
  )
  prefix, inventory = "visual_encoder.", official_inventory.inventory("videocap", g, CLIP_TEXT)
  return arrays(
    {
      name.removeprefix(prefix): x.shape for name, x in inventory.items() if name.startswith(prefix)
    },
    seed,
  )


def clip_leaves(tensors):
  """Returns the expected parameters, by hand."""
  v = {name.removeprefix("visual."): x for name, x in tensors.items() if name.startswith("visual.")}

  def stack(name, f=lambda x: x):
    return np.stack([f(v[f"transformer.resblocks.{i}.{name}"]) for i in range(2)])  # noqa: E731

  leaves = {
    "class_embedding": v["class_embedding"],
    "position_embedding": v["positional_embedding"],
    "patch_embed/kernel": v["conv1.weight"].transpose(2, 3, 1, 0).reshape(8 * 8 * 3, 64),
  }
  for norm in ("ln_pre", "ln_post"):
    leaves |= {f"{norm}/scale": v[f"{norm}.weight"], f"{norm}/bias": v[f"{norm}.bias"]}
  for norm in ("ln_1", "ln_2"):
    leaves |= {
      f"blocks/{norm}/scale": stack(f"{norm}.weight"),
      f"blocks/{norm}/bias": stack(f"{norm}.bias"),
    }
  for n, name in enumerate(("query", "key", "value")):
    part = slice(64 * n, 64 * (n + 1))
    leaves |= {
      f"blocks/attention/{name}/kernel": stack(
        "attn.in_proj_weight", lambda x, part=part: x[part].T
      ),
      f"blocks/attention/{name}/bias": stack("attn.in_proj_bias", lambda x, part=part: x[part]),
    }
  for ours, theirs in (
    ("attention/out", "attn.out_proj"),
    ("mlp/up", "mlp.c_fc"),
    ("mlp/down", "mlp.c_proj"),
  ):
    leaves |= {
      f"blocks/{ours}/kernel": stack(f"{theirs}.weight", np.transpose),
      f"blocks/{ours}/bias": stack(f"{theirs}.bias"),
    }
  return {f"visual_encoder/{path}": x for path, x in leaves.items()}


def huggingface(tensors, kind="CLIPModel"):
  """OpenAI's tensors under the names that transformers gives them in its model `kind`."""
  renames = (
    ("transformer.resblocks.", "encoder.layers."),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    (".ln_1", ".layer_norm1"),
    (".ln_2", ".layer_norm2"),
    (".attn.", ".self_attn."),
    ("visual.", "vision_model."),
    ("ln_pre", "pre_layrnorm"),
    ("ln_post", "post_layernorm"),
    ("vision_model.class_embedding", "vision_model.embeddings.class_embedding"),
    ("vision_model.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("vision_model.conv1", "vision_model.embeddings.patch_embedding"),
  )
  out = {"vision_model.embeddings.position_ids": np.arange(5)[None]}
  for name, x in tensors.items():
    if not name.startswith("visual.") or name == "visual.proj":
      continue
    for old, new_name in renames:
      name = name.replace(old, new_name)
    if "in_proj" in name:
      out |= {
        name.replace("in_proj_", f"{p}_proj."): part for p, part in zip("qkv", np.split(x, 3))
      }
    else:
      out[name] = x
  if kind != "CLIPVisionModel":
    out["visual_projection.weight"] = tensors["visual.proj"].T
  if kind == "CLIPModel":
    text = arrays(
      {
        "embeddings.token_embedding.weight": (11, 16),
        "final_layer_norm.bias": (16,),
        "encoder.layers.0.mlp.fc1.bias": (64,),
      }
    )
    out |= {f"text_model.{name}": x for name, x in text.items()} | {
      "text_model.embeddings.position_ids": np.arange(5)[None]
    }
    out |= {
      "text_projection.weight": np.ones((8, 16), np.float32),
      "logit_scale": np.array(4.6, np.float32),
    }
  return out
