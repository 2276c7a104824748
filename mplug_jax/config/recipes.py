"""Recipes that several configs share: files, training from scratch, official fine-tuning."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ml_collections import config_dict

from mplug_jax.config.arguments import SUFFIXES


def split_files(root: str, train: str, val: str, test: str) -> dict[str, Any]:
  """Returns the fields of config.data for one annotation file per split, all in the folder root."""
  return {
    "train_files": (os.path.join(root, train),),
    "val_file": os.path.join(root, val),
    "test_file": os.path.join(root, test),
  }


def own_data(arg: Any) -> dict[str, Any]:
  """Returns the fields of config.data for the user's data: jsonl, folder, shards or tfds.

  Args:
    arg: result of `parse_arg`.
  """
  if arg.data == "folder":
    return {"image_root": arg.root}
  return {"jsonl": own_files, "shards": own_shards, "tfds": own_tfds}[arg.data](arg)


# Values of data.examples whose configs evaluate the user's own test split, see `test_or_val`.
_EVALUATED_ON_TEST = ("caption", "retrieval", "pretrain")


class _Operation(NamedTuple):
  """An operation of a FieldReference: the value is fn(referenced value, *args)."""

  fn: Callable[..., str]
  args: tuple


def test_or_val(c: Any) -> None:
  """Evaluates the user's own data on split "test" if it exists, else on "val".

  The split follows data.test_file, data.val_file and data.image_root, whatever sets them, until
  eval.split itself is set. Without both splits it is "test", so that the error names its file.

  Args:
    c: config with the user's data, as of `own_data`; its eval.split is replaced.
  """
  if c.data.name == "jsonl":
    keys, choose = ("test_file", "val_file"), _split_of_files
  elif c.data.name == "folder":
    keys, choose = ("image_root",), _split_of_folder
  else:
    return
  first, *others = (c.data.get_ref(key) for key in keys)
  operation: Any = _Operation(choose, tuple(others))
  del c.eval.split
  c.eval.split = config_dict.FieldReference(first, field_type=str, op=operation)


def _split_of_files(test: str, val: str) -> str:
  """Returns the split to evaluate, given the files of both."""
  return "val" if not os.path.isfile(test) and os.path.isfile(val) else "test"


def _split_of_folder(root: str) -> str:
  """Returns the split to evaluate, given the folder with the folders of both."""
  val, test = (os.path.isdir(os.path.join(root, split)) for split in ("val", "test"))
  return "val" if val and not test else "test"


def split_note(config: Any) -> str:
  """Says that the validation split is evaluated because there is no test split.

  Args:
    config: config of a run.

  Returns:
    One sentence, or "" if that is not so.
  """
  data = config.data
  if data.examples not in _EVALUATED_ON_TEST or data.name not in ("jsonl", "folder"):
    return ""
  if config.eval.split != "val":
    return ""
  if data.name == "folder":
    test, exists = os.path.join(data.image_root, "test"), os.path.isdir
  else:
    test, exists = data.test_file, os.path.isfile
  if exists(test):
    return ""
  return f"{test or 'config.data.test_file'} does not exist: the split val is evaluated."


def own_files(arg: Any) -> dict[str, Any]:
  """Returns the fields of config.data for the user's own annotation files, data=jsonl.

  data=jsonl,root=FOLDER reads train, val and test under FOLDER, each with the first of SUFFIXES
  that exists, else .jsonl, so that the error names that file. data=jsonl:FILE trains on FILE; the
  other splits are files beside it with val or test in place of train in their names. Images are
  read from the folder of FILE or from root=.

  Args:
    arg: result of `parse_arg`.
  """
  folder = (os.path.dirname(arg.file) or ".") if arg.file else arg.root
  name = os.path.basename(arg.file) if arg.file else "train.jsonl"
  suffix = next(
    (suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(suffix)),
    "",
  )
  stem = name.removesuffix(suffix)
  files = {}
  for split in ("train", "val", "test"):
    paths = [
      os.path.join(folder, (stem.replace("train", split) if "train" in stem else split) + end)
      for end in (suffix, *SUFFIXES)
    ]
    files[split] = next(filter(os.path.isfile, paths), paths[0])
  return {
    "train_files": (arg.file or files["train"],),
    "val_file": files["val"],
    "test_file": files["test"],
    "image_root": arg.root or folder,
  }


def own_shards(arg: Any) -> dict[str, Any]:
  """Returns the fields of config.data for data=shards:PATTERN.

  PATTERN names the training shards. If it contains "train", val and test in its place name the
  other splits.

  Args:
    arg: result of `parse_arg`.
  """
  head, train, tail = arg.file.rpartition("train")
  val, test = (head + split + tail if train else "" for split in ("val", "test"))
  return {
    "train_files": (arg.file,) if arg.file else (),
    "val_file": val,
    "test_file": test,
    "image_root": arg.root,
  }


def own_tfds(arg: Any) -> dict[str, Any]:
  """Returns the fields of config.data for data=tfds:NAME.

  Args:
    arg: result of `parse_arg`; its root is the data folder, "" the default one of TFDS.
  """
  # Karpathy's training split has both parts of COCO captions.
  train = "train+restval" if arg.file.startswith("coco_captions") else "train"
  return {"builder": arg.file, "data_dir": arg.root, "splits": (train, "val", "test")}


def variant(module: Any, arg: Any, **options: Any) -> Any:
  """Returns another config, unlocked, of the size arg.size.

  Args:
    module: config module, as `from configs import vqa`.
    arg: result of `parse_arg`.
    **options: options of that config's argument; empty ones are left out.
  """
  arguments = [f"{key}={value}" for key, value in options.items() if value]
  return module.get_config(",".join([arg.size, *arguments])).unlock()


def scenes(c: Any, arg: Any, steps: int, **fields: Any) -> None:
  """Sets up training on the generated scenes of mplug_jax/scenes.

  Texts about scenes mention left and right and every object, so that a config mirrors or crops
  only where its data can.

  Args:
    c: config to change.
    arg: result of `parse_arg`.
    steps: number of updates.
    **fields: further fields of c.data.
  """
  size = arg.res or 96
  c.total_steps = steps
  c.data.update({"size": size, "seed": 0, "difficulty": "default", **fields})
  # 500 of 20,000 records contain all words; every word is one token.
  c.tokenizer.update({"records": 500, "vocab_size": 512})
  c.model.image_size = size


def from_scratch(c: Any, lr: float, initializer_range: float) -> None:
  """Sets up training from random initialization on little data, for two CPU cores.

  Dropout is off, because it only slows such runs. For tasks that need cross-attention before the
  loss falls, an initializer_range of 0.1 and a small learning rate need hundreds of updates less
  than 0.05: the output of cross-attention is then as large as its input.

  Args:
    c: config to change.
    lr: learning rate of Muon.
    initializer_range: standard deviation of all weights but the image encoder's.
  """
  c.optim.update({"name": "muon", "lr": lr, "b2": 0.98})
  c.optim.schedule.warmup_steps = 50
  c.model.update(
    {
      "dropout_rate": 0.0,
      "attention_dropout_rate": 0.0,
      "vision_attention_dropout_rate": 0.0,
      "initializer_range": initializer_range,
    }
  )


def official(
  c: Any, batch_size: int, lr: float, visual_lr: float, dtype: str = "bfloat16", **schedule: Any
) -> None:
  """Sets optimizer groups and schedule of the official fine-tuning recipes.

  Args:
    c: config to change.
    batch_size: rows of the global batch.
    lr: learning rate of all but the image encoder.
    visual_lr: learning rate of the image encoder.
    dtype: of the computation.
    **schedule: fields of the official schedule.
  """
  c.update({"batch_size": batch_size, "log_every": 50})
  c.model.dtype = dtype
  c.optim.update({"lr": lr, "visual_lr": visual_lr, "groups": "official"})
  # Assigned, because `update` would keep the fields of the default schedule.
  c.optim.schedule = {"name": "official", **schedule}
  c.checkpoint.every = 500


def finish(c: Any, arg: Any, unused: str, new: Sequence[str] = ()) -> Any:
  """Applies the tiny size and the config argument; called last.

  Args:
    c: config to change.
    arg: result of `parse_arg`.
    unused: pattern of parameters of arg.init that the task may lack.
    new: patterns of parameters of the task that arg.init may lack.

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
