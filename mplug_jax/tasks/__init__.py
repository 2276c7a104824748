"""Tasks: parameters to initialize, a loss to minimize, functions that predict."""

import importlib

# Task name -> "module:class"; the module is imported when its task is asked for.
TASKS = {
  "caption": "mplug_jax.tasks.caption:Task",
  "classification": "mplug_jax.tasks.classification:Task",
  "grounding": "mplug_jax.tasks.grounding:Task",
  "pretrain": "mplug_jax.tasks.pretrain:Task",
  "retrieval": "mplug_jax.tasks.retrieval:Task",
  "scst": "mplug_jax.tasks.scst:Task",
  "vqa": "mplug_jax.tasks.vqa:Task",
}


def get(name: str) -> type:
  """Returns the task class `name`.

  Raises:
    ValueError: no such task; the message lists the known ones.
  """
  if name not in TASKS:
    known = ", ".join(sorted(TASKS))
    raise ValueError(f"config.task.name={name!r} is not a task; there are: {known}.")
  module, _, symbol = TASKS[name].partition(":")
  return getattr(importlib.import_module(module), symbol)
