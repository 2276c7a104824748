"""config.json: writing, reading, names of earlier versions, and which differences forbid resuming."""

import json

import ml_collections
from ml_collections import ConfigDict


def flat(config):
  """Config or plain dictionary -> {"optim.schedule.name": value, ...}; an empty section is a value."""
  out = {}
  for key, value in config.items():
    nested = isinstance(value, ConfigDict | dict) and len(value)
    out |= {f"{key}.{name}": v for name, v in flat(value).items()} if nested else {key: value}
  return out


_FIXED = (
  "task",
  "model",
  "tokenizer",
  "data",
  "batch_size",
  "seed",
)  # sections that a resumed run shares with its beginning


_FREE = ("model.attention",)  # of those, what changes rounding alone


# Keys that runs from before they existed do not have in their config.json, with the value that says what those did.
_LATER = {
  "data.fields": "",
  "data.allow_overlap": False,
  "data.shuffle_block": 0,
  "data.augment.sharpness_wraps": False,
  "data.easier": 0.5,
  "model.loss_chunk": 0,
  "task.negatives.ramp_steps": 0,
  "data.empty_prefix": 0.0,
  "model.attention": "plain",
  "task.contrast_chunk": 0,
}


def resume_conflicts(old, new):
  """Differences between the config of a run and the one it shall be resumed with.

  Args:
    old: dictionary read from the run's config.json.
    new: the present one, of JSON values.

  Returns:
    (differences that forbid resuming, differences to tell the user), as "optim.lr: 0.001 -> 0.01".
  """
  old, new = _LATER | flat(old), _LATER | flat(json.loads(json.dumps(new)))
  refuse, notice = [], []
  for name in sorted(old.keys() | new.keys()):
    before, after = (json.dumps(c[name]) if name in c else "(absent)" for c in (old, new))
    if before != after:
      section = name.split(".")[0]
      (refuse if section in _FIXED and name not in _FREE else notice).append(
        f"{name}: {before} -> {after}"
      )
  return refuse, notice


def to_json(config):
  """ConfigDict -> json text, keys in their order."""
  return json.dumps(config.to_dict(), indent=2, default=str) + "\n"


def from_json(text):
  """Text of a config.json -> ConfigDict."""
  return ml_collections.ConfigDict(json.loads(text))
