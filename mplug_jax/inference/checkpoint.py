"""A checkpoint ready for use: its config, tokenizer, model, and its parameters on the devices; nothing of training."""

import json
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from mplug_jax import config as config_lib
from mplug_jax.checkpoints import reading, warm_start
from mplug_jax.checkpoints.position_embeddings import LEAF as POSITIONS
from mplug_jax.config.presets import PRESETS
from mplug_jax.conversion import storage
from mplug_jax.data.text import sentencepiece, wordpiece
from mplug_jax.data.text import tokenizer as tokenizer_lib
from mplug_jax.models import factory
from mplug_jax.parallel import mesh as mesh_lib
from mplug_jax.parallel import rules

# Fields of config.model that follow from the weights; the others are how it computes.
_GEOMETRY = ("embed_dim", "fusion", "vision_heads", "pairing", "classes", *PRESETS["base"])


class Restored(NamedTuple):
  """path: of the checkpoint. parts: names of the parts of the parameters. params: float32, on the mesh."""

  path: str
  config: ConfigDict
  tokenizer: Any
  model: Any
  mesh: Any
  params: Any

  @property
  def parts(self):
    return set(self.params)


def restore(path, config=None, tokenizer=None, devices=None):
  """Reads a checkpoint.

  Args:
    path: run folder, or converted checkpoint (folder or file). config: of another task than the run's, ConfigDict or
      "configs/vqa.py:base"; None: the run's own. tokenizer: a Tokenizer, its folder or its vocab.txt; None: the run's own.
    devices: to use; None: all of this process.

  Raises:
    FileNotFoundError, ValueError, checkpoint.CheckpointError: one sentence.
  """
  path = os.fspath(path)
  config, shapes = _config_of(path, config), reading.array_shapes(path)
  tokenizer = _tokenizer_of(path, tokenizer)
  mesh = _mesh(config, devices or jax.local_devices())
  model = factory.build_model(config, tokenizer)
  averaged = config.ema.decay > 0 and config.ema.use in ("eval", "both")
  which = (
    "ema_params"
    if averaged and any(name.startswith("ema_params/") for name in shapes)
    else "params"
  )
  shapes = {
    name.removeprefix(f"{which}/"): tuple(shape)
    for name, shape in shapes.items()
    if name.startswith(f"{which}/")
  }
  if not shapes:
    raise ValueError(f"{path} holds no parameters.")
  if POSITIONS in shapes:
    shapes[POSITIONS] = (
      1 + (config.model.image_size // config.model.patch_size) ** 2,
      *shapes[POSITIONS][1:],
    )
  abstract = {
    name: jax.ShapeDtypeStruct(
      shape, jnp.float32, sharding=NamedSharding(mesh, rules.parameter_spec(name, shape, mesh))
    )
    for name, shape in shapes.items()
  }
  return Restored(
    path,
    config,
    tokenizer,
    model,
    mesh,
    warm_start.load_params(path, traverse_util.unflatten_dict(abstract, sep="/"), which),
  )


def _config_of(path, given):
  """The ConfigDict that fits the weights: the run's, or the given one with the weights' geometry."""
  if isinstance(given, str | os.PathLike):
    given = config_lib.load(os.fspath(given))
  geometry = _geometry(path)
  if isinstance(geometry, ConfigDict):
    if given is None:
      return geometry
    geometry = {name: geometry.model[name] for name in _GEOMETRY if name in geometry.model}
  config = _of_weights(path) if given is None else given.copy_and_resolve_references().unlock()
  own = (
    () if given is None else ("image_size", "classes", "pairing")
  )  # positions are resized; heads are the task's
  config.model.update(
    {name: value for name, value in geometry.items() if name in config.model and name not in own}
  )
  return config


def _geometry(path):
  """config.json of a run as ConfigDict, or the fields of MPlug of a converted checkpoint. Raises FileNotFoundError, ValueError."""
  if not os.path.exists(path):
    raise FileNotFoundError(f"No such checkpoint or run folder: {path}.")
  file = os.path.join(path, "config.json")
  if os.path.isfile(file):
    with open(file) as text:
      try:
        return config_lib.from_json(text.read())
      except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON ({error}); the run's folder is damaged.") from error
  if description := storage.read_description(path):
    return description[0]
  raise ValueError(
    f"{path} is neither a run folder (config.json) nor a checkpoint of tools.convert_checkpoint (model.json)."
  )


def _of_weights(path):
  """A config for converted weights of which nobody says what they were trained for: what their parts are made for."""
  parts = {name.split("/")[1] for name in reading.array_shapes(path) if name.startswith("params/")}
  if "cls_head" in parts:
    raise ValueError(
      f"{path} classifies, and its classes are not known: name the config, config='configs/snli_ve.py:base' or another."
    )
  known = (
    ("pretrain", {"itm_head", "text_decoder"}),
    ("retrieval", {"itm_head"}),
    ("vqa", {"fusion_encoder", "text_decoder"}),
    ("caption", {"text_decoder"}),
  )
  task = next((task for task, needed in known if needed <= parts), None)
  if task is None:
    raise ValueError(
      f"{path} has {', '.join(sorted(parts))} and no head to ask: train it on a task with config.init.paths first."
    )
  return config_lib.default_config(task, "base")


def _tokenizer_of(path, given):
  """The run's tokenizer, or the given one. Raises FileNotFoundError, ValueError."""
  own = os.path.join(path, "tokenizer")
  if given is None:
    if not os.path.isdir(own):
      raise ValueError(
        f"{path} has no tokenizer: name the vocabulary that it was trained with, tokenizer='vocab.txt'."
      )
    return tokenizer_lib.load(own)
  if not isinstance(given, str | os.PathLike):
    return given
  if os.path.isdir(given):
    return tokenizer_lib.load(given)
  return (
    sentencepiece.SentencePieceTokenizer
    if os.fspath(given).endswith(".model")
    else wordpiece.WordPieceTokenizer
  )(given)


def _mesh(config, devices):
  """The config's mesh where these devices fit it, else the batch split over all of them."""
  try:
    return mesh_lib.make_mesh(config.mesh, devices)
  except ValueError:
    return mesh_lib.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, devices)
