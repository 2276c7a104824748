"""Whether a checkpoint supports a method of Predictor, and the task that runs the method."""

from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from mplug_jax import tasks
from mplug_jax.inference import methods
from mplug_jax.tasks import base


def refusal(name: str, path: str, parts: Collection[str], config: Any) -> str:
  """Returns one sentence on why a checkpoint does not support a method; "" if it does.

  Args:
    name: of the method.
    path: of the checkpoint, for the sentence.
    parts: parts of the parameters that the checkpoint has.
    config: the checkpoint's ConfigDict.
  """
  method = methods.METHODS[name]
  trained_task = config.task.name
  advice = f"train one with --config={method.config}:init={path}"
  if missing := [part for part in ("visual_encoder", *method.parts) if part not in parts]:
    return (
      f"{path} cannot {method.verb}: a {trained_task} checkpoint has no {', '.join(missing)}; "
      f"{advice}."
    )
  if trained_task not in method.trained:
    return f"{path} cannot {method.verb}: it was trained for {trained_task}; {advice}."
  if method.images_per_text and (count := config.data.images_per_text) != method.images_per_text:
    images = "1 image" if count == 1 else f"{count} images"
    return f"{path} cannot {method.verb}: its cls_head reads {images}; {advice}."
  return ""


def make_task(
  name: str, model: Any, config: Any, tokenizer: Any, frames: int = 0, **changes: Any
) -> base.Task:
  """Builds the task of a method.

  Settings are those of the checkpoint if it was trained for that task, else `Task.zero_shot`.

  Args:
    name: of the method.
    model: the MPlug module.
    config: the checkpoint's ConfigDict.
    tokenizer: the checkpoint's tokenizer.
    frames: frames of a clip; 0 for images.
    **changes: fields of config.task to replace.
  """
  task_name = methods.METHODS[name].task
  task_class = tasks.get(task_name)
  task, data = task_class.zero_shot
  if issubclass(tasks.get(config.task.name), task_class):
    task = {**task, **config.task.to_dict()}
    data = {**data, **config.data.to_dict()}
  settings: Any = ConfigDict(
    {
      "task": {**task, "name": task_name, **changes},
      "data": {**data, "frames": frames},
      "ema": config.ema,
      "optim": config.optim,
      "batch_size": config.batch_size,
      "model": config.model,
      "eval": config.eval,
    }
  )
  if "max_positions" in settings.model:
    for key in ("max_question", "max_caption"):
      if key in settings.data:
        settings.data[key] = min(settings.data[key], settings.model.max_positions)
  return task_class(model, settings, tokenizer)
