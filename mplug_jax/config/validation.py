"""Checks of config values, before anything is built."""

from collections.abc import Iterable
from typing import Any

from mplug_jax.config.resume import flat

_CHOICES = {
  "model.dtype": ("float32", "bfloat16"),
  "model.attention_impl": ("auto", "reference"),
  "model.ops": ("auto", "reference"),
  "prng_impl": ("hash", "jax"),
  "optim.accumulate": ("global", "mean_of_means"),
  "ema.use": ("teacher", "eval", "both"),
  "eval.vqa_script": ("2021", "2017"),  # a key of the benchmark's configs alone
}


_POSITIVE = ("batch_size", "log_every", "optim.microbatches", "checkpoint.every", "eval.batch_size")


def check(config: Any) -> None:
  """Checks values that would otherwise fail late or be misread.

  Raises:
    ValueError: names the key, its value and what it may be.
  """
  values = flat(config)
  for name, known in _CHOICES.items():
    if values.get(name, known[0]) not in known:
      raise ValueError(f"config.{name}={values[name]!r} is not one of {', '.join(known)}.")
  for name in _POSITIVE:
    if values[name] < 1:
      raise ValueError(f"config.{name}={values[name]} must be at least 1.")
  heads = {
    "hidden_size": config.model.heads,
    "vision_width": config.model.vision_heads or config.model.vision_width // 64,
  }
  for width, number in heads.items():
    if number < 1 or config.model[width] % number:
      raise ValueError(
        f"config.model.{width}={config.model[width]} cannot be divided into {number} "
        "attention heads."
      )
  if config.batch_size % config.optim.microbatches:
    raise ValueError(
      f"config.optim.microbatches={config.optim.microbatches} does not divide "
      f"config.batch_size={config.batch_size}."
    )


def check_fields(owner: str, fields: Iterable[str], known: Iterable[str]) -> None:
  """Checks the names of fields.

  Args:
    owner: what has the fields, for the message.
    fields: names to check.
    known: valid names.

  Raises:
    ValueError: a field is not among the known ones.
  """
  if extra := sorted(set(fields) - set(known)):
    raise ValueError(
      f"{owner} has no field {', '.join(extra)}; it takes {', '.join(sorted(known))}."
    )
