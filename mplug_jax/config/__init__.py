"""Shared parts of configs: arguments, defaults, recipes, validation, resume rules; no JAX.

Config files import this package and use the names below; each is documented in its module.
"""

from typing import Any, TypeAlias

from mplug_jax.config.arguments import config_file, load, parse_arg
from mplug_jax.config.command_line import resolve_config_flag, unknown_key
from mplug_jax.config.defaults import default_config
from mplug_jax.config.presets import PAPER_SIZES
from mplug_jax.config.recipes import (
  finish,
  from_scratch,
  official,
  own_data,
  own_files,
  own_shards,
  own_tfds,
  scenes,
  split_files,
  split_note,
  test_or_val,
  variant,
)
from mplug_jax.config.resume import flat, from_json, rename, resume_conflicts, to_json, upgrade
from mplug_jax.config.validation import check, check_fields

# ConfigDict. Its fields are dynamic, so that type checkers cannot know them.
Config: TypeAlias = Any

__all__ = [
  "PAPER_SIZES",
  "Config",
  "check",
  "check_fields",
  "config_file",
  "default_config",
  "finish",
  "flat",
  "from_json",
  "from_scratch",
  "load",
  "official",
  "own_data",
  "own_files",
  "own_shards",
  "own_tfds",
  "parse_arg",
  "rename",
  "resolve_config_flag",
  "resume_conflicts",
  "scenes",
  "split_files",
  "split_note",
  "test_or_val",
  "to_json",
  "unknown_key",
  "upgrade",
  "variant",
]
