"""Sources, transforms and the input pipeline. Nothing here imports JAX.

`config.data.examples` names the module of this package that knows a kind of records. It has

  get_source(data, split): random-access records of config.data;
  texts(source, records): their texts, what a tokenizer is fitted to; `records` of them, evenly spaced, 0 for all;
  make_transform(config, tokenizer, train): records to examples of fixed shape, see pipeline.py.
"""

import importlib


def examples(config):
  """The module that config.data.examples names."""
  return importlib.import_module(f"{__name__}.{config.data.examples}")


def get_source(config, split):
  """The records of one split: "train", "val" or "test"; errors as of the module."""
  return examples(config).get_source(config.data, split)


def texts(config, source):
  """The texts that the run's tokenizer is fitted to."""
  return examples(config).texts(source, config.tokenizer.records)


def make_transform(config, tokenizer, train):
  """The transform of records to examples for pipeline.train_batches (`train`: draw and augment) or eval_batches."""
  return examples(config).make_transform(config, tokenizer, train)
