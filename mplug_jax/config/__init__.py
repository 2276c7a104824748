"""What all configs share: the argument behind `configs/x.py:`, and the sections with their defaults. Imports no JAX."""

import importlib.util
import json
import os
from typing import Any, TypeAlias

import ml_collections
from ml_collections import ConfigDict, config_dict

from mplug_jax.config import arguments
from mplug_jax.config.presets import PRESETS

# ConfigDict. Its fields are dynamic, so that type checkers cannot know them.
Config: TypeAlias = Any


def parse_arg(arg, **spec):
  """Parses "base,res=384,data=vqa_v2" against `spec`, {name: default}, whose values also give the types.

  The first part without "=" is the size, a name in PRESETS. Booleans are written true or false, and a name alone, after
  the size, means true. Where `spec` has `data`, its value may go on behind a colon: data=jsonl:FILE, see own_files, data=folder:ROOT,
  data=shards:PATTERN, see own_shards, or data=tfds:NAME, see own_tfds.

  Returns:
    ConfigDict of `spec` with the given values, and `size`; with `data` also `file`, what jsonl, shards or tfds: names, or "".

  Raises:
    ValueError: an unknown name or size, or a value of another type; the message lists what there is.
  """
  values = ConfigDict({"size": "small", **spec})
  for i, part in enumerate(p.strip() for p in (arg or "").split(",") if p.strip()):
    name, equals, text = part.partition("=")
    if not equals and name in PRESETS and i == 0:
      values.size = name
      continue
    if name not in values:
      known = ", ".join(f"{k}={v}" for k, v in sorted(values.items()))
      raise ValueError(
        f"The config argument {part!r} is unknown. First a size, {', '.join(PRESETS)}; then any of {known}."
      )
    values[name] = _typed(name, text if equals else "true", spec.get(name, ""))
  if values.size not in PRESETS:
    raise ValueError(f"The size {values.size!r} is unknown; there are {', '.join(PRESETS)}.")
  if "data" in spec:
    values.file = ""
    given, (values.data, colon, path) = values.data, values.data.partition(":")
    if colon:
      place = {"jsonl": "file", "folder": "root", "shards": "file", "tfds": "file"}.get(values.data)
      if not place or not path:
        raise ValueError(
          f"The config argument data={given!r} must be data=jsonl:FILE, data=folder:FOLDER, data=shards:PATTERN or "
          "data=tfds:NAME; others take root=."
        )
      values[place] = path
  return values.lock()


def sibling(file, name):
  """The config module `name` in the folder of the config `file`, for a config that changes another one."""
  spec = importlib.util.spec_from_file_location(
    f"config_{name}", os.path.join(os.path.dirname(file), f"{name}.py")
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def load(name):
  """The config that a command line calls `name`: FILE, or FILE:ARGUMENT.

  Raises:
    FileNotFoundError: no such file. ValueError: what its get_config says of the argument.
  """
  file, _, arg = name.partition(":")
  if not os.path.isfile(file):
    raise FileNotFoundError(f"The config {file} does not exist.")
  return sibling(file, os.path.basename(file).removesuffix(".py")).get_config(arg)


def choose(table, data):
  """The entry of `table` for the config argument data=...

  Raises:
    ValueError: lists what there is.
  """
  if data not in table:
    raise ValueError(f"The config argument data={data!r} is unknown; there are {', '.join(table)}.")
  return table[data]


def own_files(arg):
  """One's own data, of data=jsonl: the fields of config.data that name the files and the folder of the images.

  data=jsonl,root=FOLDER: train, val and test under FOLDER, each with the first of tables.SUFFIXES with which it exists, else .jsonl, so
  that a message names it. data=jsonl:FILE trains on FILE; what is called alike but with val or test for train lies beside it, and the
  images in its folder, unless root= says otherwise.
  """
  folder = (os.path.dirname(arg.file) or ".") if arg.file else arg.root
  name = os.path.basename(arg.file) if arg.file else "train.jsonl"
  suffix = next(
    (
      suffix
      for suffix in sorted(arguments.SUFFIXES, key=len, reverse=True)
      if name.endswith(suffix)
    ),
    "",
  )
  stem, found = name.removesuffix(suffix), {}
  for split in ("train", "val", "test"):
    paths = [
      os.path.join(folder, (stem.replace("train", split) if "train" in stem else split) + end)
      for end in (suffix, *arguments.SUFFIXES)
    ]
    found[split] = next(filter(os.path.isfile, paths), paths[0])
  return {
    "train_files": (arg.file or found["train"],),
    "val_file": found["val"],
    "test_file": found["test"],
    "image_root": arg.root or folder,
  }


def own_shards(arg):
  """The fields of config.data for data=shards:PATTERN: train on what PATTERN names; if "train" is in it, val and test are called alike."""
  head, train, tail = arg.file.rpartition("train")
  val, test = (head + split + tail if train else "" for split in ("val", "test"))
  return {
    "train_files": (arg.file,) if arg.file else (),
    "val_file": val,
    "test_file": test,
    "image_root": arg.root,
  }


def own_tfds(arg):
  """The fields of config.data for data=tfds:NAME, prepared in the folder root=, else where TFDS puts it."""
  train = (
    "train+restval" if arg.file.startswith("coco_captions") else "train"
  )  # Karpathy's split has both
  return {"builder": arg.file, "data_dir": arg.root, "splits": (train, "val", "test")}


def variant(file, name, arg, **options):
  """The unlocked config `name` beside the config `file`, of the size arg.size and with those `options` that are not empty."""
  given = [f"{key}={value}" for key, value in options.items() if value]
  return sibling(file, name).get_config(",".join([arg.size, *given])).unlock()


def scenes(c, arg, steps, **fields):
  """Training on the generated scenes of data/scenes.py, `fields` of `c.data` included.

  Scenes name sides, and every object counts: a config mirrors and crops only where its data can.
  """
  size = arg.res or 96
  c.total_steps = steps
  c.data.update({"size": size, "seed": 0, "difficulty": "default", **fields})
  c.tokenizer.update(
    {"records": 500, "vocab_size": 512}
  )  # of 20,000: few words, often repeated; all of them whole
  c.model.image_size = size


def from_scratch(c, lr, initializer_range):
  """From random initialisation on little data, as two CPU cores can learn from it; `initializer_range` of all but the image encoder.

  Dropout would only slow that down. Where a sentence must meet an image before anything can be learnt, 0.1 and a small rate do it
  hundreds of updates sooner than 0.05: cross-attention then adds as much as it finds, and noise does not wash it away.
  """
  c.optim.update({"name": "muon", "lr": lr, "b2": 0.98})
  c.optim.schedule.warmup_steps = 50
  c.model.update(
    {
      "dropout": 0.0,
      "attention_dropout": 0.0,
      "vision_attention_dropout": 0.0,
      "initializer_range": initializer_range,
    }
  )


def official(c, batch_size, lr, visual_lr, dtype="bfloat16", **schedule):
  """What the official recipes share: groups and schedule of the optimizer, in `dtype`."""
  c.update({"batch_size": batch_size, "log_every": 50})
  c.model.dtype = dtype
  c.optim.update({"lr": lr, "visual_lr": visual_lr, "groups": "official"})
  # Assigned, for `update` would keep the fields of the default schedule.
  c.optim.schedule = {"name": "official", **schedule}
  c.checkpoint.every = 500


def finish(c, arg, unused, new=()):
  """The tiny size, and what the config argument says, after everything else.

  Args:
    unused: pattern of the parameters that the task does without, should arg.init have them.
    new: patterns of those it adds to what arg.init has.

  Returns:
    The locked config.
  """
  if arg.size == "tiny":
    c.update({"batch_size": 8, "total_steps": 4, "log_every": 2})
    c.eval.update({"batch_size": 8, "limit": 16})
    c.optim.schedule.warmup_steps = 1
  if arg.res:
    c.model.image_size = arg.res
  if arg.steps:
    c.total_steps = arg.steps
  if arg.init:
    c.init.update({"paths": (arg.init,), "new": new, "unused": (unused,)})
  return c.lock()


def _typed(name, text, default):
  """`text` as the type of `default`."""
  if isinstance(default, bool):
    if text.lower() not in ("true", "false"):
      raise ValueError(f"The config argument {name}={text!r} must be true or false.")
    return text.lower() == "true"
  try:
    return type(default)(text)
  except ValueError:
    kind = "whole number" if isinstance(default, int) else "number"
    raise ValueError(f"The config argument {name}={text!r} must be a {kind}.") from None


def defaults(task, size):
  """The sections every config has, filled for the model size `size`; a config changes what its recipe needs.

  All durations are in updates unless they say epochs. The comments are the reference for users.
  """
  c = ConfigDict()
  c.name = task
  c.seed = 0
  c.batch_size = 32  # rows of the global batch
  c.total_steps = 0  # 0: total_epochs passes over the training data
  c.total_epochs = 0
  c.log_every = 50
  c.profile_steps = (0, 0)  # (first, last) updates to trace into workdir/profile; (0, 0): none
  c.compilation_cache = "~/.cache/mplug_jax"  # "" turns it off
  c.tensorboard = False  # event files beside metrics.jsonl
  c.task = ConfigDict({"name": task})
  c.model = ConfigDict(
    {
      "dtype": "float32",
      "remat": "none",
      "attention": "auto",
      "loss_chunk": 0,
      "fusion": "released",
      "pairing": "shared",
      "dropout": 0.1,
      "attention_dropout": 0.1,
      "vision_attention_dropout": 0.1,
      "vision_heads": 0,
      "initializer_range": 0.02,
      "classes": 2,
      "temperature": 0.07,
      "embed_dim": 256,
      **PRESETS[size],
    }
  )
  c.tokenizer = ConfigDict(
    {
      "kind": "wordpiece" if size in ("base", "large", "huge") else "sentencepiece",
      "path": "",  # vocab.txt of wordpiece; "" for sentencepiece: fitted to the training texts
      "vocab_size": 320,  # upper bound of a fitted one
      "locations": 0,  # tokens for box coordinates in a fitted one
      "records": 0,  # training records it is fitted to, evenly spaced; 0: all
    }
  )
  c.data = ConfigDict(
    {
      "frames": 0,  # of a clip that an example shows instead of an image; 0: images
      "frame_sampling": "centres",  # or "official", or the number of one frame: see data/video.py
      "fields": "",  # what annotation files call our keys, "question=q,image=file": see data/json_records.py
      "allow_overlap": False,  # val_file and test_file may be trained on, and be one file
      "shuffle_block": 0,  # so many neighbouring records stay near each other, for slow disks: see data/pipeline.py; 0: none
    }
  )
  c.loader = ConfigDict(
    {"workers": 0, "threads": 2}
  )  # Grain processes (0: none), else threads; neither changes the data
  c.optim = ConfigDict(
    {
      "name": "adamw",
      "lr": 1e-3,
      "visual_lr": 1e-3,
      "weight_decay": 0.02,
      "b1": 0.9,
      "b2": 0.999,
      "eps": 1e-8,
      "momentum": 0.95,
      "mu_dtype": "float32",
      "clip": 1.0,
      "groups": config_dict.FieldReference(
        "plain", field_type=object
      ),  # a table by name, or rows: see optim.resolve_groups
      "schedule": ConfigDict({"name": "cosine", "warmup_steps": 200}, convert_dict=False),
      "microbatches": 1,  # the batch is split in this many parts, whose gradients are added
      "accumulate": "global",  # or "mean_of_means", the official division by each part's own count
    }
  )
  c.init = ConfigDict(
    {
      "paths": (),  # start from these: results of tools.convert_checkpoint, or runs; the first that has a parameter counts
      "new": (),
      "unused": (),  # regexes of parameters that may stay random; of those found that the model may lack
      "copies": (),  # (regex, replacement) pairs: a parameter that is nowhere found starts as the one of the other name
    }
  )
  c.ema = ConfigDict(
    {"decay": 0.0, "include": ".*", "use": "eval"}
  )  # decay 0: off; use: teacher, eval or both
  c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
  c.checkpoint = ConfigDict(
    {
      "every": 1000,  # updates
      "keep": 2,  # the last ones, beside the best: should the newest be damaged, a run goes on from the one before
    }
  )
  c.eval = ConfigDict(
    {"every": 0, "batch_size": 64, "limit": 0, "split": "test"}
  )  # every 0: at the end; limit 0: all
  return c


_FIXED = (
  "task",
  "model",
  "tokenizer",
  "data",
  "batch_size",
  "seed",
)  # sections that a resumed run shares with its beginning
_FREE = ("model.attention",)  # of those, what changes rounding alone
_CHOICES = {
  "model.dtype": ("float32", "bfloat16"),
  "model.attention": ("auto", "plain"),
  "optim.accumulate": ("global", "mean_of_means"),
  "ema.use": ("teacher", "eval", "both"),
}
_POSITIVE = ("batch_size", "log_every", "optim.microbatches", "checkpoint.every", "eval.batch_size")


def check(config):
  """Refuses values that would fail late or obscurely, or pass for something else.

  Raises:
    ValueError: names the key, its value and what it may be.
  """
  values = flat(config)
  for name, known in _CHOICES.items():
    if values[name] not in known:
      raise ValueError(f"config.{name}={values[name]!r} is not one of {', '.join(known)}.")
  for name in _POSITIVE:
    if values[name] < 1:
      raise ValueError(f"config.{name}={values[name]} must be at least 1.")
  heads = {
    "hidden_size": config.model.heads,
    "vision_width": config.model.vision_heads or config.model.vision_width // 64,
  }
  for width, number in heads.items():
    if number < 1 or config.model[width] % number:
      raise ValueError(
        f"config.model.{width}={config.model[width]} cannot be divided into {number} attention heads."
      )
  if config.batch_size % config.optim.microbatches:
    raise ValueError(
      f"config.optim.microbatches={config.optim.microbatches} does not divide config.batch_size={config.batch_size}."
    )


def check_fields(what, fields, known):
  """Raises ValueError naming the fields of `what` that are not among the known ones."""
  if extra := sorted(set(fields) - set(known)):
    raise ValueError(
      f"{what} has no field {', '.join(extra)}; it takes {', '.join(sorted(known))}."
    )


def flat(config):
  """Config or plain dictionary -> {"optim.schedule.name": value, ...}; an empty section is a value."""
  out = {}
  for key, value in config.items():
    nested = isinstance(value, ConfigDict | dict) and len(value)
    out |= {f"{key}.{name}": v for name, v in flat(value).items()} if nested else {key: value}
  return out


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
