"""Evaluators: a task's own data, a jitted predict function, and the benchmark's own metric. They know no models."""

import importlib


def get(name):
  """The Evaluator class for the task `name`."""
  return importlib.import_module(f"{__name__}.{name}").Evaluator
