"""Builds that several runs of a test process share, so that equal programs are traced once."""

import copy
import json
import math

import jax

from mplug_jax import config as config_lib
from mplug_jax.parallel import mesh as mesh_lib
from mplug_jax.training import build as build_lib
from tests.support import mesh_case, random_state

_BUILDS = {}
# Sections and keys of the config that the programs of a run depend on.
_READ = ("prng_impl", "seed", "batch_size", "task", "model", "optim", "ema", "mesh")
# Endings of keys of config.data that only the readers of files use.
_READERS = (
  *("_root", "_file", "_files", "name", "strict", "allow_overlap", "fields", "augment"),
  *("size", "seed", "difficulty", "records", "black_images", "shuffle_block"),
  *("add_objects", "add_ocr", "max_words", "frame_sampling", "_suffix"),
)


def _key(config, tokenizer, steps):
  values = json.loads(config_lib.to_json(config))
  read = [values[name] for name in _READ]
  read.append({k: v for k, v in values["data"].items() if not k.endswith(_READERS)})
  if values["optim"]["schedule"]["name"] == "constant":  # whatever the length of the run
    steps = ()
  return json.dumps([read, values["eval"]["batch_size"], steps]), tokenizer.fingerprint


def build(config, tokenizer, *steps, devices=None):
  """Returns training.build.build on one device, or on all if the mesh has so many, or on `devices`.

  Args:
    config: config of the run.
    tokenizer: its tokenizer.
    *steps: total_steps and steps_per_epoch. Without them a build of any length serves.
    devices: devices of a build of its own.
  """
  config_lib.check(config)
  if devices is not None:
    return build_lib.build(config, tokenizer, *steps, devices=devices)
  key = _key(config, tokenizer, steps)
  if key not in _BUILDS:
    all_devices = config.mesh.data * config.mesh.fsdp * config.mesh.tensor == jax.device_count()
    devices = jax.devices() if all_devices else jax.devices()[:1]
    _BUILDS[key] = build_lib.build(config, tokenizer, *steps, devices=devices)
  built = _BUILDS[key]
  task = copy.copy(built.task)
  task.config = config
  return built._replace(task=task)


def build_drawn(config, tokenizer, *steps, devices=None):
  """Returns `build` with parameters that are drawn on the host instead of a compiled `init`."""
  built = build(config, tokenizer, *steps, devices=devices)
  return built._replace(init=random_state.Init(built, config.model.initializer_range, config.seed))


def build_to_evaluate(config, tokenizer):
  """Returns a Build for evaluation alone, with neither optimizer nor what is traced beforehand.

  It is on one device, or on all if the mesh has so many.
  """
  config_lib.check(config)
  key = "evaluated", _key(config, tokenizer, ())
  if key not in _BUILDS:
    shape = tuple(config.mesh[axis] for axis in mesh_lib.AXES)
    all_devices = math.prod(shape) == jax.device_count()
    built = mesh_case.light_build(config, tokenizer)
    built = mesh_case.on_mesh(built, shape if all_devices else (1, 1, 1))
    predict = {
      name: build_lib._predictor(fn, built.mesh) for name, fn in built.task.predict_fns().items()
    }
    _BUILDS[key] = built._replace(predict=predict)
  return _BUILDS[key]
