"""Conversion of Hugging Face's CLIP, OpenAI's CLIP and open_clip, alone and with BERT."""

import json

import jax
import ml_collections
import numpy as np
import pytest

from mplug_jax.checkpoints import reading, warm_start
from mplug_jax.conversion import exporter, importer, mapping
from mplug_jax.conversion.geometry import infer_geometry
from mplug_jax.conversion.names import config_beside, source_kind
from mplug_jax.parallel import rules
from mplug_jax.tensor_files import open
from mplug_jax.training.state import TrainState
from tests.support.source_checks import assert_leaves, converted, refused, saved
from tests.support.source_tensors import (
  VISION,
  bert,
  bert_leaves,
  clip,
  clip_leaves,
  huggingface,
)
from tests.support.torch_pickles import archive, new, tensor


@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection"])
def test_hugging_face_clip_fills_the_image_encoder_and_comes_back(kind, tmp_path):
  tensors = huggingface(clip(), kind)
  assert source_kind(tensors) == "huggingface_clip"
  assert_leaves(converted(tensors, tmp_path / "a"), clip_leaves(clip()))
  exporter.export_torch(
    tmp_path / "a" / "converted.safetensors", tmp_path / "back.safetensors", slim=True
  )
  live = {
    name: x
    for name, x in tensors.items()
    if not name.startswith(("text_", "visual_projection", "logit_scale"))
  }
  with open.open_tensors(tmp_path / "back.safetensors") as file:
    back = {
      name: file[name] for name in file if not name.startswith("text_model.embeddings.position_ids")
    }
  assert_leaves(back, live)


def test_position_numbers_follow_a_table_that_was_resized(tmp_path):
  tensors = huggingface(clip(), "CLIPVisionModel")
  table, patches = (
    tensors[f"vision_model.embeddings.{name}"]
    for name in ("position_embedding.weight", "patch_embedding.weight")
  )
  side = int(np.sqrt(len(table) - 1)) + 2
  converted(tensors, tmp_path / "a", image_size=side * patches.shape[-1])
  exporter.export_torch(tmp_path / "a" / "converted.safetensors", tmp_path / "back.safetensors")
  with open.open_tensors(tmp_path / "back.safetensors") as file:
    assert file.shape("vision_model.embeddings.position_embedding.weight") == (
      1 + side * side,
      table.shape[1],
    )
    np.testing.assert_array_equal(
      file["vision_model.embeddings.position_ids"], np.arange(1 + side * side)[None]
    )


def test_hugging_face_clip_by_the_names_of_a_vision_model_alone(tmp_path):
  """Transformers from version 5 on leaves the prefix of CLIPVisionModel out."""
  tensors = {
    name.removeprefix("vision_model."): x
    for name, x in huggingface(clip(), "CLIPVisionModel").items()
  }
  assert source_kind(tensors) == "huggingface_clip"
  assert "encoder.layers.1.mlp.fc2.bias" in tensors
  assert_leaves(converted(tensors, tmp_path / "a"), clip_leaves(clip()))


def test_mistakes_in_hugging_face_clip_are_named():
  tensors = huggingface(clip())
  key = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
  without = {name: x for name, x in tensors.items() if name != key}
  refused(without, "1 leaves missing: visual_encoder/blocks/attention")
  refused(
    without | {key.replace("self_attn", "attn"): tensors[key]},
    "1 unknown tensors: .*; 1 leaves missing",
  )
  refused(
    tensors | {key: tensors[key][:3]}, "1 tensors of another shape: vision_model.encoder.layers"
  )
  refused(
    tensors | {"cls.predictions.bias": np.zeros(3)}, "1 unknown tensors: cls.predictions.bias"
  )
  patches = "vision_model.embeddings.patch_embedding.weight"
  refused(
    {name: x for name, x in tensors.items() if name != patches},
    patches + ", from which .* is missing",
  )
  refused(tensors | bert(), "belong to several models: Hugging Face's CLIP .* and BERT")


TOWER = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
CLIP_FILES = {
  "OpenAI's state dict": (
    lambda t: t | {n: np.array(7) for n in ("input_resolution", "context_length", "vocab_size")},
    "",
  ),
  "open_clip": (lambda t: t, ""),
  "open_clip with a text module": (
    lambda t: {"text." * n.startswith(TOWER) + n: x for n, x in t.items()},
    "",
  ),
  "open_clip in training": (lambda t: {f"module.{n}": x for n, x in t.items()}, "state_dict"),
  "both": (
    lambda t: {"module." + "text." * n.startswith(TOWER) + n: x for n, x in t.items()},
    "state_dict",
  ),
}


@pytest.mark.parametrize("style", CLIP_FILES)
def test_openai_clip_and_open_clip_fill_the_image_encoder(style, tmp_path):
  rename, wrapper = CLIP_FILES[style]
  tensors = rename(clip())
  assert source_kind(tensors) == "clip"
  expected = clip_leaves(clip())
  manifest = importer.convert_checkpoint(
    saved(tensors, tmp_path / "clip.pt", wrapper=wrapper), tmp_path / "pt"
  )
  assert_leaves(reading.load_arrays(tmp_path / "pt", "params"), expected)
  assert_leaves(converted(tensors, tmp_path / "safetensors"), expected)
  dropped = {row["why"] for row in manifest["tensors"] if row["action"] == "dead"} - {
    "CLIP's own sizes, never used"
  }
  assert dropped == {"CLIP's text tower, never run", "CLIP's own projection, never used"}
  assert (manifest["geometry"]["image_size"], manifest["geometry"]["patch_size"]) == (16, 8)


def torchscript(path, tensors):
  """An archive as torch.jit.save writes it: a tree of module objects."""
  tree = {"training": False}
  records = {}
  for i, (key, x) in enumerate(tensors.items()):
    node = tree
    (*parents, last) = key.split(".")
    for parent in parents:
      node = node.setdefault(parent, {})
    records[str(i)] = x
    node[last] = tensor(str(i), x.shape, kind="torch.HalfStorage")

  def objects(node):
    return new(
      "__torch__.clip.Module",
      {k: objects(v) if isinstance(v, dict) else v for k, v in node.items()},
    )  # noqa: E731

  return archive(path, objects(tree), records)


def test_openai_clip_as_a_torchscript_archive(tmp_path):
  """In float16, as OpenAI publishes it."""
  half = {name: x.astype(np.float16) for name, x in clip().items()}
  importer.convert_checkpoint(
    torchscript(tmp_path / "ViT.pt", half), tmp_path / "c.safetensors", dtype="float32"
  )
  result = reading.load_arrays(tmp_path / "c.safetensors", "params")
  assert {x.dtype for x in result.values()} == {np.dtype(np.float32)}
  assert_leaves(result, clip_leaves(half))


@pytest.mark.parametrize(
  ("names", "kind"),
  [
    (["visual_encoder.visual.proj", "temp"], "mplug"),
    (["module.text_encoder_m.bert.pooler.dense.bias"], "mplug"),
    (["logit_scale", "visual.proj"], "clip"),
    (["module.visual.proj", "text.ln_final.bias"], "clip"),
    (["text_model.final_layer_norm.bias", "vision_model.pre_layrnorm.bias"], "huggingface_clip"),
    (["encoder.layers.0.mlp.fc1.bias"], "huggingface_clip"),
    (["encoder.layer.0.output.dense.bias"], "bert"),
    (["module.bert.pooler.dense.bias"], "bert"),
    (["embeddings.word_embeddings.weight", "embeddings.position_ids"], "bert"),
  ],
)
def test_the_source_is_told_by_names(names, kind):
  assert source_kind(names) == kind


def test_an_unknown_or_mixed_source_is_named():
  with pytest.raises(
    ValueError,
    match="fit no known format: their names begin with layer1, text_model; known formats are mPLUG",
  ):
    source_kind(["layer1.0.weight", "layer1.1.weight", "text_model.embeddings.position_ids"])
  with pytest.raises(ValueError, match="several models: mPLUG .* and BERT .*a separate file"):
    source_kind(["text_encoder.embeddings.position_ids", "bert.embeddings.position_ids"])


def config(folder, **entries):
  (folder / "config.json").write_text(json.dumps(entries))
  return config_beside(folder / "model.safetensors")


def test_heads_are_read_from_the_configuration(tmp_path):
  assert config_beside(tmp_path) == {}
  assert (
    config(tmp_path, model_type="bert", num_attention_heads=12, hidden_act="gelu")
    == {"heads": 12}
    == config_beside(tmp_path)
  )
  assert config(
    tmp_path, model_type="clip_vision_model", num_attention_heads=16, hidden_size=1280
  ) == {"vision_heads": 16}
  vision = {"num_attention_heads": 12, "hidden_size": 768, "hidden_act": "quick_gelu"}
  assert (
    config(tmp_path, model_type="clip", vision_config=vision, hidden_size=5) == {}
  )  # what is assumed anyway
  assert config(tmp_path, model_type="clip", vision_config=vision | {"num_attention_heads": 4}) == {
    "vision_heads": 4
  }
  assert config(tmp_path, model={"heads": 3}) == {}  # a run's


def test_a_configuration_that_does_not_fit_is_named(tmp_path):
  with pytest.raises(
    ValueError,
    match="config.json: hidden_act is 'gelu', but the converted model uses 'quick_gelu'.*rename",
  ):
    config(tmp_path, model_type="clip", vision_config={"hidden_act": "gelu"})
  with pytest.raises(
    ValueError, match="config.json is not a model configuration .*num_attention_heads 'a'"
  ):
    config(tmp_path, model_type="bert", num_attention_heads="a")
  for text in ("[1]", "{", '{"model_type": "clip", "vision_config": [1]}'):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is not a model configuration"):
      config_beside(tmp_path)


def test_clip_and_bert_together_start_a_model_with_all_parts(tmp_path):
  """Each leaf comes from its source; cross-attention, projection and heads are new."""
  text = bert(layers=8)
  paths = tuple(str(tmp_path / f"{name}.safetensors") for name in ("clip", "bert"))
  importer.convert_checkpoint(saved(clip(), tmp_path / "clip.pt"), paths[0])
  importer.convert_checkpoint(saved(text, tmp_path / "bert.pth"), paths[1], text_layers=4)
  g = infer_geometry(
    {name: x.shape for name, x in text.items()},
    text_layers=4,
    fusion_layers=4,
    stride=3,
    embed_dim=8,
    **VISION,
  )
  shapes = mapping.leaf_shapes(g)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def position(x):
    return jax.device_put(x, device)

  fresh = {path: np.full(shape, 9, np.float32) for path, shape in shapes.items()}

  def nested(leaves):
    return jax.tree.map(position, nest(leaves))

  state = TrainState(
    step=0, params=nested(fresh), opt_state=(), ema_params=nested(fresh), extra=(), rng=None
  )
  new_leaves = (".*crossattention.*", "(vision_proj|text_proj|itm_head|temp)/.*")
  options = ml_collections.ConfigDict(dict(paths=paths, new=new_leaves, unused=(), copies=()))
  started, report = warm_start.init_from(state, options)

  from_clip = clip_leaves(clip())
  from_bert = bert_leaves(text, 4, 4, 8)
  expected = fresh | from_clip | from_bert
  assert_leaves(flat(started.params), expected)
  assert_leaves(flat(started.ema_params), expected)
  where = {
    path: paths[0] if path in from_clip else paths[1] if path in from_bert else "new"
    for path in shapes
  }
  assert report == where
  new_parts = {path.split("/")[0] for path, source in where.items() if source == "new"}
  assert new_parts == {
    "fusion_encoder",
    "text_decoder",
    "vision_proj",
    "text_proj",
    "itm_head",
    "temp",
  }
  assert not any("layer_3/crossattention" in path for path in shapes)  # connected
  with pytest.raises(ValueError, match="parameters are in none of the checkpoints"):
    warm_start.init_from(
      state, ml_collections.ConfigDict(dict(paths=paths, new=new_leaves[1:], unused=(), copies=()))
    )


def nest(leaves):
  tree = {}
  for path, x in leaves.items():
    node = tree
    (*parents, last) = path.split("/")
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = x
  return tree


def flat(tree):
  return {rules.path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}
