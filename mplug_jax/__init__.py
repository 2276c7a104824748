"""mPLUG (Li et al., EMNLP 2022) in JAX/Flax: cross-modal skip-connected vision-language models.

Public names are imported on first use, so that data workers start without JAX.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from mplug_jax.inference.explain import Explainer
  from mplug_jax.inference.inputs import Clip
  from mplug_jax.inference.predictor import Predictor
  from mplug_jax.runtime.process import tune_process

__all__ = ["Clip", "Explainer", "Predictor", "__version__", "tune_process"]
__version__ = "0.2.0"

_LAZY = {
  "Clip": "inference.inputs",
  "Explainer": "inference.explain",
  "Predictor": "inference.predictor",
  "tune_process": "runtime.process",
}


def __getattr__(name: str) -> Any:
  if name not in _LAZY:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  import importlib

  return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
