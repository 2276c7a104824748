"""Builds that several runs of a test process share, so that equal programs are traced once."""

import copy
import functools
import json

import jax

from mplug_jax import config as config_lib
from mplug_jax.training import build as build_lib
from tests.support import random_state

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


def _shared(key, config, make):
  """Returns the build of this key, made on one device, or on all if the mesh has so many."""
  if key not in _BUILDS:
    all_devices = config.mesh.data * config.mesh.fsdp * config.mesh.tensor == jax.device_count()
    _BUILDS[key] = make(devices=jax.devices() if all_devices else jax.devices()[:1])
  built = _BUILDS[key]
  task = copy.copy(built.task)
  task.config = config
  return built._replace(task=task)


def build(config, tokenizer, *steps, devices=None):
  """Returns training.build.build on one device, on all if the mesh has so many, or on `devices`.

  Args:
    config: config of the run.
    tokenizer: its tokenizer.
    *steps: total_steps and steps_per_epoch. Without them a build of any length serves.
    devices: devices of a build of its own.
  """
  config_lib.check(config)
  make = functools.partial(build_lib.build, config, tokenizer, *steps)
  if devices is not None:
    return make(devices=devices)
  return _shared(_key(config, tokenizer, steps), config, make)


def build_drawn(config, tokenizer, *steps, devices=None):
  """Returns `build` with parameters that are drawn on the host instead of a compiled `init`."""
  built = build(config, tokenizer, *steps, devices=devices)
  return built._replace(init=random_state.Init(built, config.model.initializer_range, config.seed))


def build_for_evaluation(config, tokenizer):
  """Returns a build of `build` whose predict functions serve, else a shared EvaluationBuild."""
  config_lib.check(config)
  key = _key(config, tokenizer, ())
  if key not in _BUILDS:
    key = "evaluation", key
  make = functools.partial(build_lib.build_for_evaluation, config, tokenizer)
  return _shared(key, config, make)
