"""Sources, transforms and the input pipeline. Nothing here imports JAX."""

import importlib


def make_transform(config, tokenizer, train):
  """The transform of records to examples that `config.data.examples` names, a module of this package.

  Args:
    config: the run's ConfigDict.
    tokenizer: see tokenizer.py.
    train: draw and augment, or evaluate.

  Returns:
    A transform for pipeline.train_batches or eval_batches.
  """
  return importlib.import_module(f"{__name__}.{config.data.examples}").make_transform(config, tokenizer, train)
