"""Random state dicts of the official model at a small geometry, and helpers of their tests."""

import functools

import ml_dtypes
import numpy as np

from mplug_jax.conversion import mapping, official_inventory
from mplug_jax.tensor_files import open, write

TEXT_TOWER = official_inventory.ClipText(width=16, layers=1, embed=8, context=5, vocab=11)


GIVEN = dict(heads=2, fusion_layers=2, stride=1)


def geometry(large=False):
  return (
    dict(
      image_size=16,
      patch_size=8,
      vision_width=64,
      vision_layers=2,
      vocab_size=690,
      hidden_size=32 if large else 64,
      mlp_dim=48,
      max_positions=20,
      text_layers=2,
      decoder_layers=2,
      embed_dim=8,
      pad_id=0,
    )
    | GIVEN
  )


def state_dict(task, large=False, seed=0):
  """Random tensors of the official model of a small geometry: float32, some float16 and bfloat16.

  Tied names equal.
  """
  rng = np.random.default_rng(seed)
  tensors = {}
  inventory = official_inventory.inventory(
    task, geometry(large), TEXT_TOWER, stored_fusion_layers=4, queue=6
  )
  for i, (name, tensor) in enumerate(inventory.items()):
    if tensor.dtype == "int64":
      tensors[name] = (
        rng.integers(-100, 100, tensor.shape)
        if "queue" in name
        else official_inventory.constant(name, tensor)
      )
    else:
      dtype = (np.float32, np.float16, ml_dtypes.bfloat16)[i % 3 if task == "vqa" else 0]
      tensors[name] = np.asarray(rng.standard_normal(tensor.shape), np.float32).astype(dtype)
  for suffix in ("", "_m"):
    head, bert = (f"text_decoder{suffix}.{part}" for part in ("cls.predictions", "bert"))
    if f"{head}.bias" in tensors:
      tensors[f"{head}.decoder.bias"] = tensors[f"{head}.bias"]
      tensors[f"{head}.decoder.weight"] = tensors[f"{bert}.embeddings.word_embeddings.weight"]
  if "bbox_prob_mask" in tensors:
    tensors["bbox_prob_mask"] = official_inventory.constant(
      "bbox_prob_mask", inventory["bbox_prob_mask"]
    )
  return tensors


def save(path, tensors, **options):
  write.save_pth(path, tensors, **options)
  return path


def read(path):
  with open.open_tensors(path) as file:
    return {name: file[name] for name in file}


def assert_same_bytes(converted, expected):
  assert converted.keys() == expected.keys()
  for name, x in expected.items():
    assert (converted[name].dtype, converted[name].shape) == (x.dtype, x.shape), name
    assert converted[name].tobytes() == x.tobytes(), name


@functools.cache
def _converter(task, momentum):
  inventory = official_inventory.inventory(
    task, geometry(), TEXT_TOWER, stored_fusion_layers=4, queue=6
  )
  return mapping.Converter(mapping.online_names(inventory, momentum), geometry())


def dead(name, task="vqa"):
  momentum = bool(mapping.online_names([name], momentum=True))
  online = next(iter(mapping.online_names([name], momentum)))
  return _converter(task, momentum).entry(online).action == "dead"


STYLES = {
  "pre-training": (
    ("text_encoder.", "text_encoder.bert."),
    ("fusion_encoder.", "fusion_encoder.fusion."),
  ),
  "masked language model": (
    ("fusion_encoder.", "fusion_encoder.bert."),
    ("text_encoder_m.", "text_encoder_m.bert."),
    ("fusion_encoder_m.", "fusion_encoder_m.bert."),
  ),
  "distributed": (("", "module."),),
  "ModelScope": (("", "model."),),
  "distributed pre-training": (
    ("text_encoder.", "text_encoder.bert."),
    ("fusion_encoder.", "fusion_encoder.fusion."),
    ("", "module."),
  ),
}
