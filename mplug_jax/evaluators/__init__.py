"""Evaluators, one per benchmark: data of a split, a predict function and the benchmark's metric."""

import importlib

# Task name -> "module:class"; the module is imported on first use.
EVALUATORS = {
  "caption": "mplug_jax.evaluators.caption:CaptionEvaluator",
  "classification": "mplug_jax.evaluators.classification:ClassificationEvaluator",
  "grounding": "mplug_jax.evaluators.grounding:GroundingEvaluator",
  "pretrain": "mplug_jax.evaluators.retrieval:RetrievalEvaluator",  # Zero-shot retrieval.
  "retrieval": "mplug_jax.evaluators.retrieval:RetrievalEvaluator",
  "scst": "mplug_jax.evaluators.caption:CaptionEvaluator",
  "vqa": "mplug_jax.evaluators.vqa:VqaEvaluator",
}


def get(name: str) -> type:
  """Returns the evaluator class of a task.

  Args:
    name: name of the task.
  """
  module, _, symbol = EVALUATORS[name].partition(":")
  return getattr(importlib.import_module(module), symbol)
