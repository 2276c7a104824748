"""Restores a checkpoint for inference: config, tokenizer, model, and parameters on the devices."""

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from mplug_jax import config as config_lib
from mplug_jax.checkpoints import reading, warm_start
from mplug_jax.checkpoints.position_embeddings import LEAF as POSITIONS
from mplug_jax.conversion import storage
from mplug_jax.conversion.geometry import GEOMETRY
from mplug_jax.data.text import sentencepiece, wordpiece
from mplug_jax.data.text import tokenizer as tokenizer_lib
from mplug_jax.models import factory
from mplug_jax.parallel import mesh as mesh_lib
from mplug_jax.parallel import rules
from mplug_jax.runtime import files

# Fields of config.model that follow from the weights; the others are how it computes.
_GEOMETRY = (*GEOMETRY, "pairing", "classes")


class Restored(NamedTuple):
  """A checkpoint ready for inference.

  Attributes:
    path: of the checkpoint.
    config: ConfigDict that fits the weights.
    tokenizer: the checkpoint's tokenizer.
    model: the MPlug module.
    mesh: of the devices.
    params: float32 parameters, on the mesh.
  """

  path: str
  config: Any
  tokenizer: Any
  model: Any
  mesh: jax.sharding.Mesh
  params: Any

  @property
  def parts(self) -> set[str]:
    """Names of the parts of the parameters."""
    return set(self.params)


def restore(
  path: str | os.PathLike,
  config: Any = None,
  tokenizer: Any = None,
  devices: Sequence[Any] | None = None,
) -> Restored:
  """Restores a checkpoint.

  Args:
    path: run folder, or converted checkpoint (folder or file).
    config: of another task than the run's, ConfigDict or "configs/vqa.py:base"; None: the run's.
    tokenizer: a Tokenizer, its folder or its vocab.txt; None: the run's.
    devices: JAX devices to use; None: all of this process.

  Returns:
    The Restored checkpoint; averaged parameters if config.ema says so.

  Raises:
    FileNotFoundError, ValueError, CheckpointError: the checkpoint cannot be used; one sentence.
  """
  path = os.fspath(path)
  config = _config_of(path, config)
  tokenizer = _tokenizer_of(path, tokenizer)
  mesh = _mesh(config, devices or jax.local_devices())
  model = factory.build_model(config, tokenizer)
  name, shapes = _parameter_shapes(path, config)
  abstract = {
    leaf: jax.ShapeDtypeStruct(
      shape, jnp.float32, sharding=NamedSharding(mesh, rules.parameter_spec(leaf, shape, mesh))
    )
    for leaf, shape in shapes.items()
  }
  params = warm_start.load_params(path, traverse_util.unflatten_dict(abstract, sep="/"), name)
  return Restored(path, config, tokenizer, model, mesh, params)


def _parameter_shapes(path: str, config: Any) -> tuple[str, dict[str, tuple[int, ...]]]:
  """Returns the parameters to load, "params" or "ema_params", and their shapes in the model.

  Raises:
    ValueError: the checkpoint has no parameters.
  """
  stored = reading.array_shapes(path)
  averaged = config.ema.decay > 0 and config.ema.use in ("eval", "both")
  has_average = any(leaf.startswith("ema_params/") for leaf in stored)
  name = "ema_params" if averaged and has_average else "params"
  shapes = {
    leaf.removeprefix(f"{name}/"): tuple(shape)
    for leaf, shape in stored.items()
    if leaf.startswith(f"{name}/")
  }
  if not shapes:
    raise ValueError(f"{path} holds no parameters.")
  if POSITIONS in shapes:  # interpolated to the size of the images
    patches = (config.model.image_size // config.model.patch_size) ** 2
    shapes[POSITIONS] = (1 + patches, *shapes[POSITIONS][1:])
  return name, shapes


def _config_of(path: str, config: Any) -> Any:
  """Returns the run's ConfigDict, or the given one with the geometry of the weights."""
  if isinstance(config, str | os.PathLike):
    config = config_lib.load(os.fspath(config))
  geometry = _geometry(path)
  if isinstance(geometry, ConfigDict):
    if config is None:
      return geometry
    model: Any = geometry.model
    geometry = {name: model[name] for name in _GEOMETRY if name in model}
  if config is None:
    config = _default_config(path)
    kept = ()
  else:
    config = config.copy_and_resolve_references().unlock()
    # Position embeddings are interpolated; heads belong to the task.
    kept = ("image_size", "classes", "pairing")
  config.model.update(
    {name: x for name, x in geometry.items() if name in config.model and name not in kept}
  )
  return config


def _geometry(path: str) -> Any:
  """Returns the ConfigDict of a run, or {field of config.model: value} of converted weights.

  Raises:
    FileNotFoundError: there is nothing at the path.
    ValueError: not a checkpoint, or a damaged config.json.
  """
  if not files.open_path(path).exists():
    raise FileNotFoundError(f"No such checkpoint or run folder: {path}.")
  file = files.open_path(os.path.join(path, "config.json"))
  if file.is_file():
    try:
      return config_lib.from_json(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
      raise ValueError(f"{file} is not JSON ({error}); the run folder is damaged.") from error
  if description := storage.read_description(path):
    return description[0]
  raise ValueError(
    f"{path} is neither a run folder (config.json) nor a checkpoint of "
    "tools.convert_checkpoint (model.json)."
  )


def _default_config(path: str) -> Any:
  """Returns the default config of the task that converted weights have the parts of."""
  parts = {name.split("/")[1] for name in reading.array_shapes(path) if name.startswith("params/")}
  if "cls_head" in parts:
    raise ValueError(
      f"{path} is a classifier without the names of its classes; pass its config, as "
      "config='configs/snli_ve.py:base'."
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
      f"{path} has only {', '.join(sorted(parts))} and no head for a task; train it on a task "
      "first, with config.init.paths."
    )
  return config_lib.default_config(task, "base")


def _tokenizer_of(path: str, tokenizer: Any) -> Any:
  """Returns the run's tokenizer, or the given one. Raises FileNotFoundError, ValueError."""
  folder = os.path.join(path, "tokenizer")
  if tokenizer is None:
    if not files.open_path(folder).is_dir():
      raise ValueError(
        f"{path} has no tokenizer; pass the vocabulary that it was trained with, as "
        "tokenizer='vocab.txt'."
      )
    return tokenizer_lib.load(folder)
  if not isinstance(tokenizer, str | os.PathLike):
    return tokenizer
  if files.open_path(tokenizer).is_dir():
    return tokenizer_lib.load(tokenizer)
  if os.fspath(tokenizer).endswith(".model"):
    return sentencepiece.SentencePieceTokenizer(tokenizer)
  return wordpiece.WordPieceTokenizer(tokenizer)


def _mesh(config: Any, devices: Sequence[Any]) -> jax.sharding.Mesh:
  """Returns the config's mesh, or one that splits the batch if that does not fit the devices."""
  try:
    return mesh_lib.make_mesh(config.mesh, devices)
  except ValueError:
    return mesh_lib.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, devices)
