"""Functions of a task that Predictor compiles; they take (params, batch) and return arrays."""

import functools
from collections.abc import Callable
from typing import Any


def make_program(task: Any, program: str | int) -> Callable[[Any, Any], dict[str, Any]]:
  """Returns a predict function of a task.

  Args:
    task: a Task.
    program: a number of captions, "match", "features", "tokens" (features and image tokens), or
      the name of one of the task's predict functions.

  Returns:
    Function (params, batch) -> {name: array}.
  """
  if isinstance(program, int):
    return functools.partial(task.captions, count=program)
  if program == "match":
    return task.match_pairs
  if program in ("features", "tokens"):
    return lambda params, batch: (
      {"feature": task.apply(params, task.image_features, batch["image"])}
      | ({"tokens": batch["image"]} if program == "tokens" else {})
    )
  predict = task.predict_fns()[program]
  if program == "classify" and task.config.data.images_per_text == 1:
    return lambda params, batch: predict(params, batch | {"image": batch["image"][:, None]})
  return predict


def make_text_features(task: Any) -> Callable[[Any, Any], dict[str, Any]]:
  """Returns a function of (params, batch) that computes contrastive features of captions."""
  return lambda params, batch: {"feature": task.apply(params, task.text_features, batch["caption"])}


def make_encoder(task: Any, canvas: bool) -> Callable[[Any, Any], Any]:
  """Returns a function of (params, batch) that computes image tokens.

  Args:
    task: a Task.
    canvas: whether images are on a square canvas, whose borders are masked out.
  """
  encode = task.evaluated_image if canvas else None
  return lambda params, batch: task.with_tokens(params, batch, encode)["image"]
