"""Tasks: parameters to initialize, a loss to minimize, functions that predict."""

import importlib

# Task name -> "module:class"; the module is imported when its task is asked for.
TASKS = {
  "caption": "mplug_jax.tasks.caption:CaptionTask",
  "classification": "mplug_jax.tasks.classification:ClassificationTask",
  "grounding": "mplug_jax.tasks.grounding:GroundingTask",
  "pretrain": "mplug_jax.tasks.pretrain:PretrainTask",
  "retrieval": "mplug_jax.tasks.retrieval:RetrievalTask",
  "scst": "mplug_jax.tasks.scst:ScstTask",
  "vqa": "mplug_jax.tasks.vqa:VqaTask",
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
