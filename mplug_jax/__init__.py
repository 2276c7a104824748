"""mPLUG (Li et al., EMNLP 2022) in JAX/Flax: cross-modal skip-connected vision-language models.

This file imports nothing until it is asked for `Predictor`, so that data workers start without JAX.
"""

__version__ = "0.2.0"

_LAZY = {"Predictor": "inference.predictor", "Clip": "inference.inputs"}


def __getattr__(name):
  if name not in _LAZY:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  import importlib

  return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
