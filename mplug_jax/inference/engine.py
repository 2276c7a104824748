"""Loads a checkpoint and runs its tasks in batches; the base class of Predictor."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
from flax import errors

from mplug_jax.inference import checkpoint as restored
from mplug_jax.inference import inputs, method_tasks, methods, programs
from mplug_jax.inference.batching import Programs, padded


class Engine:
  """Runs the tasks of a checkpoint on images, clips and texts in batches; base of Predictor.

  Attributes:
    path: of the checkpoint.
    config: its ConfigDict.
    tokenizer: its tokenizer.
    model: the MPlug module.
    mesh: of the devices.
    params: float32 parameters, on the mesh.
  """

  def __init__(self, checkpoint: restored.Restored, batch_size: int = 0):
    """Wraps a restored checkpoint; `load` restores and wraps one.

    Args:
      checkpoint: the restored checkpoint.
      batch_size: maximum rows of a computation; 0: config.eval.batch_size.
    """
    self.path = checkpoint.path
    self.config = checkpoint.config
    self.tokenizer = checkpoint.tokenizer
    self.model = checkpoint.model
    self.mesh = checkpoint.mesh
    self.params = checkpoint.params
    self._parts = checkpoint.parts
    self._programs = Programs(self.params, self.mesh, batch_size or self.config.eval.batch_size)
    data = self.config.data
    self._images = inputs.ImageRows(
      self.config.model.image_size, data.get("frames", 0), data.get("frame_sampling", "uniform")
    )
    self._task: Callable[..., Any] = functools.lru_cache(None)(self._make_task)

  @classmethod
  def load(
    cls,
    checkpoint: str | os.PathLike,
    config: Any = None,
    tokenizer: Any = None,
    *,
    batch_size: int = 0,
    devices: Sequence[Any] | None = None,
  ) -> Self:
    """Loads a checkpoint.

    Changes no setting of the calling process; `mplug_jax.tune_process()` before it makes
    computations on CPU faster and keeps compiled programs for the next start.

    Args:
      checkpoint: run folder of mplug_jax.main, or output of tools.convert_checkpoint.
      config: "configs/vqa.py:base" or a ConfigDict, for converted weights. Default: that of the
        run; for converted weights the pretraining or fine-tuning config that has their parts.
      tokenizer: vocab.txt of converted weights. Default: that of the run.
      batch_size: maximum images, and maximum texts, of a computation; 0: config.eval.batch_size.
      devices: JAX devices to use; default: all of this process.

    Returns:
      The Predictor.

    Raises:
      FileNotFoundError, ValueError, CheckpointError: the checkpoint cannot be used; one sentence.
    """
    if batch_size < 0:
      raise ValueError(
        f"batch_size={batch_size} must be at least 1, or 0 for config.eval.batch_size."
      )
    return cls(restored.restore(checkpoint, config, tokenizer, devices), batch_size)

  @property
  def batch_size(self) -> int:
    """Maximum images, and maximum texts, of a computation."""
    return self._programs.sizes[-1]

  def can(self, method: str) -> bool:
    """Returns whether the checkpoint supports the method of this name."""
    return not self._refusal(method)

  def task(self, method: str, frames: int = 0, **changes: Any) -> Any:
    """Returns the Task of a method.

    Args:
      method: name of the method.
      frames: frames of a clip; 0: images.
      **changes: fields of config.task to replace.

    Raises:
      ValueError: the checkpoint does not support it; the message says what is missing and which
        config trains it.
    """
    if problem := self._refusal(method):
      raise ValueError(problem)
    return self._task(method, frames, **changes)

  def _refusal(self, method: str) -> str:
    return method_tasks.refusal(method, self.path, self._parts, self.config)

  def _make_task(self, method: str, frames: int, **changes: Any) -> Any:
    return method_tasks.make_task(
      method, self.model, self.config, self.tokenizer, frames, **changes
    )

  def text_rows(self, method: str) -> inputs.TextRows:
    """Returns the TextRows of a method's texts. Raises ValueError: see `task`."""
    data = self.task(method).config.data
    text = methods.METHODS[method].text
    if text is None:
      raise ValueError(f"Predictor.{method} takes no text.")
    return inputs.TextRows(
      text.noun,
      self.tokenizer,
      data[text.length],
      data.max_words if text.words else 0,
      lower=text.lower,
      ends=text.ends,
    )

  def image_rows(self, method: str, images: Sequence[Any]) -> dict[str, np.ndarray]:
    """Returns the rows of a method's images or clips.

    Args:
      method: name of the method.
      images: images, or clips; not both.

    Returns:
      {"image": u8[B, S, S, 3], ...}, of clips u8[B, F, S, S, 3].

    Raises:
      ImageError: an image cannot be read.
    """
    if methods.METHODS[method].canvas:
      return self._images.on_canvas(images)
    return self._images.resized(images)

  def encode(self, method: str, images: Sequence[Any]) -> tuple[jax.Array, dict[str, np.ndarray]]:
    """Encodes images, or clips.

    Args:
      method: name of the method.
      images: B images, or clips; not both.

    Returns:
      Tokens dtype[size, N, D] on the devices, padded after the B images; the other arrays of
      `image_rows`, [B, ...].
    """
    rows = self.image_rows(method, images)
    task = self._task(method, 0)
    canvas = methods.METHODS[method].canvas
    size = self._programs.whole(len(images))
    tokens = self._call(
      ("encode", canvas),
      functools.partial(programs.make_encoder, task, canvas),
      {name: padded(x, size) for name, x in rows.items()},
    )
    return tokens, {name: x for name, x in rows.items() if name != "image"}

  def _ask(
    self,
    method: str,
    program: str | int,
    images: Sequence[Any],
    requests: Sequence[tuple[int, ...]],
    rows: Mapping[str, np.ndarray],
    **changes: Any,
  ) -> dict[str, list]:
    """Runs a program on requests; images and clips may be mixed and repeated.

    Args:
      method: name of the method.
      program: see `programs.make_program`.
      images: images and clips.
      requests: R tuples of positions in `images`.
      rows: {name: [R, ...]}, the other inputs.
      **changes: fields of config.task to replace.

    Returns:
      {name: R arrays}.
    """
    first = {inputs.identity(image): number for number, image in reversed(list(enumerate(images)))}
    requests = [
      tuple(first[inputs.identity(images[number])] for number in request) for request in requests
    ]
    results: list[dict[str, Any]] = [{} for _ in requests]
    for clips in (False, True):
      chosen = [
        number
        for number, request in enumerate(requests)
        if inputs.is_clip(images[request[0]]) == clips
      ]
      if not chosen:
        continue
      frames = self._images.frames if clips else 0
      task = self._task(method, frames, **changes)
      key = (method, frames, program, *changes.items())
      out = self._programs.requests(
        images,
        [requests[number] for number in chosen],
        {name: x[chosen] for name, x in rows.items()},
        functools.partial(self.encode, method),
        functools.partial(self._call, key, functools.partial(programs.make_program, task, program)),
      )
      for row, number in enumerate(chosen):
        results[number] = {name: x[row] for name, x in out.items()}
    return {name: [result[name] for result in results] for name in results[0]}

  def _call(self, key: tuple, make: Callable[[], Callable], batch: Mapping[str, Any]) -> Any:
    """Calls a program. Raises ValueError: the parameters do not fit the model; one sentence."""
    try:
      return self._programs.call(key, make, batch)
    except errors.FlaxError as error:
      raise ValueError(
        f"{self.path} does not fit this configuration: {str(error).splitlines()[0]}"
      ) from error
