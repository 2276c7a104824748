"""The mapping converts names and shapes of the ten official models in both directions."""

import gzip
import json

import numpy as np
import pytest

from mplug_jax.conversion import mapping, official_inventory
from mplug_jax.conversion.geometry import infer_geometry
from tests.support import paths

with gzip.open(paths.GOLDEN / "state_dicts.json.gz") as file:
  OFFICIAL = {
    name: {
      key: official_inventory.Tensor(tuple(shape), dtype) for key, (shape, dtype) in tensors.items()
    }
    for name, tensors in json.load(file).items()
  }
models = pytest.mark.parametrize("name", OFFICIAL)


def geometry(name):
  return infer_geometry({key: x.shape for key, x in OFFICIAL[name].items()})


@models
def test_inventory_is_the_official_models(name):
  assert official_inventory.inventory(name.split("_")[0], geometry(name)) == OFFICIAL[name]


@models
def test_every_tensor_has_its_place_and_comes_back_in_its_shape(name):
  tensors = OFFICIAL[name]
  g = geometry(name)
  momentum = mapping.online_names(tensors, momentum=True)
  assert bool(momentum) == name.startswith(("vqa", "retrieval"))
  shapes = {
    path: np.broadcast_to(np.float32(0), shape) for path, shape in mapping.leaf_shapes(g).items()
  }
  for keys in (mapping.online_names(tensors), momentum):
    entries = mapping.plan({key: tensors[source].shape for key, source in keys.items()}, g)
    assert entries.keys() == keys.keys()
    written = {
      position for entry in entries.values() for position in zip(entry.paths, entry.indices)
    }
    assert len(written) == sum(
      len(entry.paths) for entry in entries.values() if entry.action == "map"
    )
    for key, entry in entries.items():
      if entry.action == "map":
        leaves = [
          shapes[path] if i is None else shapes[path][i]
          for path, i in zip(entry.paths, entry.indices)
        ]
        assert entry.inverse(leaves, tensors[keys[key]].shape).shape == tensors[keys[key]].shape, (
          key
        )


@pytest.mark.parametrize(
  ("name", "parameters"), [("vqa_base", 344_683_578), ("vqa_large", 565_252_410)]
)
def test_parameters_that_run(name, parameters):
  """The numbers that the official VQA model uses in its forward pass (docs/official.md item 42)."""
  keys = mapping.online_names(OFFICIAL[name])
  entries = mapping.plan({key: OFFICIAL[name][key].shape for key in keys}, geometry(name))
  assert (
    sum(
      int(np.prod(OFFICIAL[name][key].shape))
      for key, entry in entries.items()
      if entry.action == "map"
    )
    == parameters
  )


def test_large_has_no_connected_layer_and_base_one():
  for name, dead in (("vqa_base", 1), ("vqa_large", 0)):
    keys = mapping.online_names(OFFICIAL[name])
    entries = mapping.plan({key: OFFICIAL[name][key].shape for key in keys}, geometry(name))
    crossing = [
      key for key, entry in entries.items() if entry.action == "dead" and "connected" in entry.text
    ]
    assert len(crossing) == 10 * dead
    assert all(key.startswith("fusion_encoder.encoder.layer.9.crossattention") for key in crossing)


def test_constants_and_initial_values():
  tensors = official_inventory.inventory("grounding", geometry("grounding_large"))
  value = {
    name: official_inventory.constant(name, tensors[name])
    for name in ("prefix_ids", "target_ids", "bbox_prob_mask")
  }
  assert value["prefix_ids"].tolist() == [344]
  assert value["target_ids"][[0, -1]].tolist() == [
    345,
    681,
  ]
  assert set(np.flatnonzero(value["bbox_prob_mask"] == 0)) == set(range(345, 682))
  assert value["bbox_prob_mask"].min() == -10000
  rng = np.random.default_rng(0)
  for name, std in (
    ("visual_encoder.positional_embedding", 0.01),
    ("visual_encoder.token_embedding.weight", 0.02),
    ("visual_encoder.visual.proj", 1024**-0.5),
    ("visual_encoder.text_projection", 768**-0.5),
    ("visual_encoder.transformer.resblocks.0.attn.in_proj_weight", 768**-0.5),
    ("visual_encoder.transformer.resblocks.0.attn.out_proj.weight", 768**-0.5 * 24**-0.5),
    ("visual_encoder.transformer.resblocks.0.mlp.c_fc.weight", 1536**-0.5),
    ("visual_encoder.transformer.resblocks.0.mlp.c_proj.weight", 768**-0.5 * 24**-0.5),
    ("fusion_encoder.encoder.layer.0.output.dense.weight", 0.02),
  ):
    x = official_inventory.initial(name, tensors[name], rng)
    assert x.shape == tensors[name].shape, name
    assert abs(x.std() / std - 1) < 0.02, (name, x.std(), std)
  assert (
    official_inventory.initial(
      "fusion_encoder.embeddings.LayerNorm.weight", official_inventory.Tensor((3,)), rng
    )
    == 1
  ).all()
  assert (
    official_inventory.initial("visual_encoder.ln_final.bias", official_inventory.Tensor((3,)), rng)
    == 0
  ).all()
  assert official_inventory.initial(
    "visual_encoder.logit_scale", official_inventory.Tensor(()), rng
  ) == np.float32(np.log(1 / 0.07))


def test_an_unknown_task_is_named():
  with pytest.raises(ValueError, match="no official model for the task 'nlvr2', only for vqa"):
    official_inventory.inventory("nlvr2", geometry("vqa_base"))
