"""Builds that several runs of a test process share, so that equal programs are traced once."""

import copy
import json

import jax

from mplug_jax import config as config_lib
from mplug_jax.training import build as build_lib
from tests.support import random_state

_BUILDS = {}
# Sections and keys of the config that the programs of a run depend on.
_READ = ("prng_impl", "seed", "batch_size", "task", "model", "optim", "ema", "mesh")
# Endings of keys of config.data that only the readers of files use.
_READERS = ("_root", "_file", "_files", "name", "strict", "allow_overlap", "fields", "augment")
_READERS += ("size", "seed", "difficulty", "records", "shuffle_block", "black_images")


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


class _DrawnInit:
  """Stands in for Build.init: draws the state on the host instead of compiling a program.

  tests/training/test_step.py compares states that the program makes.
  """

  def __init__(self, built, config):
    self._built, self._config = built, config

  def lower(self):
    return self

  def compile(self):
    return self

  def __call__(self):
    config = self._config
    return random_state.state(self._built, config.model.initializer_range, config.seed)


def build_drawn(config, tokenizer, *steps, devices=None):
  """Returns the result of `build`, whose runs start from a state drawn on the host."""
  built = build(config, tokenizer, *steps, devices=devices)
  return built._replace(init=_DrawnInit(built, config))
