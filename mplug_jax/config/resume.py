"""config.json of a run: reading, writing, names of earlier versions, and resume conflicts."""

import copy
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

# Keys of earlier versions -> today's, both as dotted paths. A row may rename a whole section.
RENAMED_KEYS: dict[str, str] = {
  "task.normalise": "task.normalize",
  "task.eval_normalisation": "task.eval_normalization",
  "data.blank_image": "data.black_images",
  "data.easier": "data.easy_fraction",
  "model.attention": "model.attention_impl",
  "model.dropout": "model.dropout_rate",
  "model.attention_dropout": "model.attention_dropout_rate",
  "model.vision_attention_dropout": "model.vision_attention_dropout_rate",
}

# Values of earlier versions, by today's key: {key: {earlier value: today's value}}.
RENAMED_VALUES: dict[str, dict[Any, Any]] = {
  "model.attention_impl": {"plain": "reference"},
  "task.prompt_mode": {"mended": "standard"},
  "task.box_weights": {"own": "per_example"},
  "data.frame_sampling": {"centres": "uniform"},
}

# Keys added after the first runs, with the value that reproduces runs without the key.
_LATER = {
  "data.fields": "",
  "data.allow_overlap": False,
  "data.shuffle_block": 0,
  "data.augment.sharpness_wraps": False,
  "data.easy_fraction": 0.5,
  "model.loss_chunk": 0,
  "task.negatives.ramp_steps": 0,
  "data.empty_prefix": 0.0,
  "model.attention_impl": "reference",
  "model.ops": "auto",
  "prng_impl": "jax",
  "task.contrast_chunk": 0,
  "eval.vqa_script": "2017",
}

# A resumed run must have these sections and keys in common with its beginning,
_FIXED = ("task", "model", "tokenizer", "data", "batch_size", "seed")
# apart from these keys, which change rounding and random draws alone.
_FREE = ("model.attention_impl", "model.ops")


def flat(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
  """Returns {"optim.schedule.name": value, ...}; an empty section is a value.

  Args:
    config: ConfigDict or nested dictionary.
  """
  out: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict | dict) and len(value):
      out |= {f"{key}.{name}": v for name, v in flat(value).items()}
    else:
      out[key] = value
  return out


def rename(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config of an earlier run with today's names of keys and values.

  Args:
    config: nested dictionary read from a config.json; it is not changed.
  """
  renamed = copy.deepcopy(dict(config))
  for old, new in RENAMED_KEYS.items():
    section, key = _section(renamed, old)
    if section is not None and key in section:
      value = section.pop(key)
      target, name = _section(renamed, new, create=True)
      assert target is not None, f"{new} is inside a value"
      target.setdefault(name, value)
  for path, values in RENAMED_VALUES.items():
    section, key = _section(renamed, path)
    if section is not None and isinstance(section.get(key), str | int | float):
      section[key] = values.get(section[key], section[key])
  return renamed


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config of an earlier run with today's names and the keys it lacks.

  Keys added later get the value that reproduces the earlier run, where their section exists. Keys
  that only change rounding are not added, so that today's default holds.

  Args:
    config: nested dictionary read from a config.json; it is not changed.
  """
  upgraded = rename(config)
  for path, value in _LATER.items():
    section, key = _section(upgraded, path)
    if section is not None and path not in _FREE:
      section.setdefault(key, value)
  return upgraded


def _section(
  config: dict[str, Any], path: str, create: bool = False
) -> tuple[dict[str, Any] | None, str]:
  """Returns (dictionary that would hold the key of a dotted path or None, last part of it)."""
  *names, key = path.split(".")
  section: Any = config
  for name in names:
    section = section.setdefault(name, {}) if create else section.get(name)
    if not isinstance(section, dict):
      return None, key
  return section, key


def resume_conflicts(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
  """Compares the config of a run with the one that resumes it.

  Args:
    old: dictionary read from the run's config.json, possibly of an earlier version.
    new: the present config as a dictionary of JSON values.

  Returns:
    (differences that forbid resuming, differences to report), as "optim.lr: 0.001 -> 0.01".
  """
  old_values = _LATER | flat(upgrade(old))
  new_values = _LATER | flat(json.loads(json.dumps(new)))
  refused: list[str] = []
  reported: list[str] = []
  for name in sorted(old_values.keys() | new_values.keys()):
    before, after = (
      json.dumps(values[name]) if name in values else "(absent)"
      for values in (old_values, new_values)
    )
    if before != after:
      fixed = name.split(".")[0] in _FIXED and name not in _FREE
      (refused if fixed else reported).append(f"{name}: {before} -> {after}")
  return refused, reported


def to_json(config: Any) -> str:
  """Returns a ConfigDict as JSON text, keys in their order.

  Raises:
    ValueError: a number is not finite, which JSON cannot represent.
  """
  for name, value in flat(config).items():
    try:
      json.dumps(value, default=str, allow_nan=False)
    except ValueError:
      raise ValueError(f"config.{name}={value!r} must be a finite number.") from None
  return json.dumps(config.to_dict(), indent=2, default=str) + "\n"


def from_json(text: str) -> ConfigDict:
  """Returns the ConfigDict of a config.json of this or an earlier version.

  Raises:
    json.JSONDecodeError: `text` is not JSON.
  """
  return ConfigDict(upgrade(json.loads(text)))
