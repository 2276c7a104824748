"""Recipes that several configs share: sources of files, training from scratch, the official fine-tuning."""

import os

from mplug_jax.config.arguments import SUFFIXES


def own_files(arg):
  """One's own data, of data=jsonl: the fields of config.data that name the files and the folder of the images.

  data=jsonl,root=FOLDER: train, val and test under FOLDER, each with the first of SUFFIXES with which it exists, else .jsonl, so
  that a message names it. data=jsonl:FILE trains on FILE; what is called alike but with val or test for train lies beside it, and the
  images in its folder, unless root= says otherwise.
  """
  folder = (os.path.dirname(arg.file) or ".") if arg.file else arg.root
  name = os.path.basename(arg.file) if arg.file else "train.jsonl"
  suffix = next(
    (suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(suffix)),
    "",
  )
  stem, found = name.removesuffix(suffix), {}
  for split in ("train", "val", "test"):
    paths = [
      os.path.join(folder, (stem.replace("train", split) if "train" in stem else split) + end)
      for end in (suffix, *SUFFIXES)
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


def variant(module, arg, **options):
  """Returns another config, unlocked, of the size arg.size.

  Args:
    module: config module, as `from configs import vqa`.
    arg: result of `parse_arg`.
    **options: options of that config's argument; empty ones are left out.
  """
  given = [f"{key}={value}" for key, value in options.items() if value]
  return module.get_config(",".join([arg.size, *given])).unlock()


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
