"""Sources, transforms and the input pipeline. Nothing here imports JAX.

`config.data.examples` names a row of EXAMPLES: the module for one kind of records. Each module has

  get_source(data, split): random-access records of config.data;
  texts(source, records): the texts that a tokenizer is fitted to, of `records` records, evenly
    spaced, 0 for all;
  make_transform(config, tokenizer, train): records to examples of fixed shape, see pipeline.py;
  VIEW: texts, images, ids and limits of a record for the data check, see examples/record_view.py.
"""

import contextlib
import importlib
import os
from collections.abc import Iterable
from types import ModuleType

from mplug_jax.config import Config
from mplug_jax.data.text.tokenizer_base import Tokenizer
from mplug_jax.data.types import Source, Transform

# config.data.examples -> its module, imported on first use.
EXAMPLES = {
  "caption": "mplug_jax.data.examples.caption",
  "classification": "mplug_jax.data.examples.classification",
  "grounding": "mplug_jax.data.examples.grounding",
  "pretrain": "mplug_jax.data.examples.pretrain",
  "retrieval": "mplug_jax.data.examples.retrieval",
  "vqa": "mplug_jax.data.examples.vqa",
}

_VERBS = {"train_files": "train", "val_file": "validate", "test_file": "test"}


def examples_module(config: Config) -> ModuleType:
  """Returns the module for config.data.examples.

  Args:
    config: config of the run.

  Raises:
    ValueError: EXAMPLES has no such row; the message lists its names.
  """
  name = config.data.examples
  if name not in EXAMPLES:
    known = ", ".join(sorted(EXAMPLES))
    raise ValueError(f"config.data.examples={name!r} is unknown; use one of: {known}.")
  return importlib.import_module(EXAMPLES[name])


def get_source(config: Config, split: str) -> Source:
  """Returns the records of one split.

  Args:
    config: config of the run.
    split: "train", "val" or "test"; "train" also runs `check_splits`.

  Raises:
    ValueError: malformed data, or splits that overlap.
    FileNotFoundError: a file is missing.
  """
  if split == "train":
    check_splits(config.data)
  return examples_module(config).get_source(config.data, split)


def check_splits(data: Config) -> None:
  """Checks that the training files are not evaluated, nor the validation file tested.

  Links count as the files they point to, and patterns of shards as all files they match. A file in
  which every image names its split, dataset_coco.json, may serve for all. config.data.allow_overlap
  turns the check off.

  Args:
    data: config.data.

  Raises:
    ValueError: two splits share a file; names both keys of config.data and the file.
  """
  if data.get("allow_overlap"):
    return
  used = [("train_files", path) for name in data.get("train_files", ()) for path in _paths(name)]
  used += [
    (key, path) for key in ("val_file", "test_file") if data.get(key) for path in _paths(data[key])
  ]
  keys = {}  # real path -> the first key that names it
  for key, path in used:
    first = keys.setdefault(os.path.realpath(path), key)
    if first != key and not _names_splits(data, path):
      effect = "measures nothing" if first == "train_files" else "leaves nothing to test on"
      raise ValueError(
        f"config.data.{first} and config.data.{key} both name {path}: to {_VERBS[first]} and "
        f"{_VERBS[key]} on the same file {effect}; give each its own file, or set "
        f"config.data.allow_overlap=True."
      )


def _paths(name):
  """Returns the files that a name in config.data matches; the name itself if there are none."""
  from mplug_jax.data.storage import remote, shards

  if shards.is_pattern(name):
    with contextlib.suppress(OSError, ValueError):
      return remote.expand(name)
  return [name]


def _names_splits(data, path):
  """Returns whether every image of a file names its split."""
  from mplug_jax.data.sources import caption

  return data.get("name") == "karpathy" and os.path.isfile(path) and caption.says_splits(path)


def texts(config: Config, source: Source | None) -> Iterable[str]:
  """Returns the texts that the tokenizer of a run is fitted to.

  For scenes these are the texts of all tasks, see scenes/corpus.py.

  Args:
    config: config of the run.
    source: training records; unused for scenes.
  """
  if config.data.name in ("scenes", "scene_captions"):
    from mplug_jax.data.sources import scenes
    from mplug_jax.scenes import corpus

    return corpus.texts(scenes.scene_config(config.data), config.tokenizer.records)
  return examples_module(config).texts(source, config.tokenizer.records)


def make_transform(config: Config, tokenizer: Tokenizer, train: bool) -> Transform:
  """Returns the transform from records to examples.

  Args:
    config: config of the run.
    tokenizer: tokenizer of the run.
    train: draws and augments, for pipeline.train_batches; otherwise for pipeline.eval_batches.
  """
  return examples_module(config).make_transform(config, tokenizer, train)
