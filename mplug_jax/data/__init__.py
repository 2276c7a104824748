"""Sources, transforms and the input pipeline. Nothing here imports JAX.

`config.data.examples` names a row of EXAMPLES: the module for one kind of records. Each module has

  get_source(data, split): random-access records of config.data;
  texts(source, records): their texts, what a tokenizer is fitted to; `records` of them, evenly
    spaced, 0 for all;
  make_transform(config, tokenizer, train): records to examples of fixed shape, see pipeline.py.
"""

import contextlib
import importlib
import os
from types import ModuleType
from typing import Any

# config.data.examples -> its module, imported when it is used.
EXAMPLES = {
  "caption": "mplug_jax.data.examples.caption",
  "classification": "mplug_jax.data.examples.classification",
  "grounding": "mplug_jax.data.examples.grounding",
  "pretrain": "mplug_jax.data.examples.pretrain",
  "retrieval": "mplug_jax.data.examples.retrieval",
  "vqa": "mplug_jax.data.examples.vqa",
}


def examples_module(config: Any) -> ModuleType:
  """Returns the module for config.data.examples.

  Raises:
    ValueError: EXAMPLES has no such row; the message lists its names.
  """
  name = config.data.examples
  if name not in EXAMPLES:
    known = ", ".join(sorted(EXAMPLES))
    raise ValueError(f"config.data.examples={name!r} is unknown; use one of: {known}.")
  return importlib.import_module(EXAMPLES[name])


def get_source(config, split):
  """The records of one split: "train", "val" or "test"; errors as of the module, for "train" also those of `check_splits`."""
  if split == "train":
    check_splits(config.data)
  return examples_module(config).get_source(config.data, split)


def check_splits(data):
  """Refuses to train on the file of another split, or to validate on the file of the test, unless data.allow_overlap says so.

  Links count as what they lead to, and patterns of shards as all they name. A file in which every
  image says its split, dataset_coco.json, may serve for all.

  Raises:
    ValueError: names the two keys of config.data and the file.
  """
  if data.get("allow_overlap"):
    return
  used = [("train_files", path) for name in data.get("train_files", ()) for path in _paths(name)]
  used += [
    (key, path) for key in ("val_file", "test_file") if data.get(key) for path in _paths(data[key])
  ]
  found = {}  # what a path leads to -> the key that names it
  for key, path in used:
    other = found.setdefault(os.path.realpath(path), key)
    if other != key and not _says_splits(data, path):
      why = "measures nothing" if other == "train_files" else "leaves nothing to test on"
      raise ValueError(
        f"config.data.{other} and config.data.{key} both name {path}: to {_USES[other]} and "
        f"{_USES[key]} on the same file "
        f"{why}; give them files of their own, or set config.data.allow_overlap=True."
      )


_USES = {"train_files": "train", "val_file": "validate", "test_file": "test"}


def _paths(name):
  """The files that a name of config.data stands for.

  The name itself if there are none, which the source will say.
  """
  from mplug_jax.data.storage import remote, shards

  if shards.is_pattern(name):
    with contextlib.suppress(OSError, ValueError):
      return remote.expand(name)
  return [name]


def _says_splits(data, path):
  """Whether a file says of its images which split they belong to."""
  from mplug_jax.data.sources import caption

  return data.get("name") == "karpathy" and os.path.isfile(path) and caption.says_splits(path)


def texts(config, source):
  """The texts that the run's tokenizer is fitted to: of scenes those of every task, see scene_corpus.py."""
  if config.data.name in ("scenes", "scene_captions"):
    from mplug_jax.data.sources import scenes
    from mplug_jax.scenes import corpus

    return corpus.texts(scenes.scene_config(config.data), config.tokenizer.records)
  return examples_module(config).texts(source, config.tokenizer.records)


def make_transform(config, tokenizer, train):
  """The transform of records to examples for pipeline.train_batches (`train`: draw and augment) or eval_batches."""
  return examples_module(config).make_transform(config, tokenizer, train)
