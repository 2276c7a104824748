"""Checks of config values, before anything is built."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

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


class _Range(NamedTuple):
  """Allowed values of a number.

  Attributes:
    low: smallest value.
    high: largest value, or None.
    above: whether `low` itself is excluded.
    below: whether `high` itself is excluded.
  """

  low: float
  high: float | None = None
  above: bool = False
  below: bool = False

  def contains(self, value: float) -> bool:
    """Returns whether a value is allowed; NaN is not."""
    if not (value > self.low if self.above else value >= self.low):
      return False
    return self.high is None or (value < self.high if self.below else value <= self.high)

  def __str__(self) -> str:
    text = f"above {self.low}" if self.above else f"at least {self.low}"
    if self.high is None:
      return text
    return f"{text} and {f'below {self.high}' if self.below else f'at most {self.high}'}"


_COUNT = _Range(1)  # of things of which there must be one
_AMOUNT = _Range(0)
_POSITIVE = _Range(0, above=True)
_PROBABILITY = _Range(0, 1)
_SHARE = _Range(0, 1, below=True)  # 1 would leave nothing

# Range -> keys. Keys that the config of a task lacks are skipped.
_RANGES = {
  _COUNT: """batch_size log_every optim.microbatches checkpoint.every checkpoint.keep
    eval.batch_size optim.schedule.epochs model.image_size model.patch_size model.hidden_size
    model.vision_width model.mlp_dim model.embed_dim model.classes data.max_question
    data.max_answers data.max_answer_tokens data.max_caption data.max_phrase data.max_text
    data.max_words data.questions_per_image data.captions_per_image data.expressions_per_image
    data.images_per_text data.sentences_per_row task.beams task.max_length task.bins""",
  _AMOUNT: """seed total_steps total_epochs optim.lr optim.visual_lr optim.weight_decay optim.clip
    optim.schedule.warmup_steps optim.schedule.warmup_epochs optim.schedule.warmup_units
    optim.schedule.warmup_lr optim.schedule.min_lr optim.schedule.end_lr eval.every eval.limit
    loader.workers loader.threads data.frames data.shuffle_block data.weights task.min_length
    task.ramp_steps task.distill.ramp_steps task.negatives.ramp_steps task.queue
    task.no_repeat_ngram task.contrast_chunk task.coefficients.itc task.coefficients.itm
    task.coefficients.mlm task.coefficients.prefix_lm model.loss_chunk tokenizer.records""",
  _POSITIVE: """optim.eps model.temperature model.initializer_range task.temperature
    data.augment.scale data.augment.long_sides""",
  _PROBABILITY: """task.alpha task.mlm_alpha task.distill.alpha data.augment.flip data.augment.crop
    data.augment.jitter data.mask_probability data.empty_prefix data.easy_fraction data.swap
    data.mirror""",
  _SHARE: """optim.b1 optim.b2 optim.momentum ema.decay model.dropout_rate
    model.attention_dropout_rate model.vision_attention_dropout_rate task.label_smoothing""",
}
# Numbers in the rows of optim.groups.
_GROUP_FIELDS = ("lr", "lr_mult", "weight_decay")


def check(config: Any) -> None:
  """Checks values that would otherwise fail late or be misread.

  Raises:
    ValueError: names the key, its value and what it may be.
  """
  values = flat(config)
  for name, known in _CHOICES.items():
    if values.get(name, known[0]) not in known:
      raise ValueError(f"config.{name}={values[name]!r} is not one of {', '.join(known)}.")
  _check_numbers(config, values)
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


def _check_numbers(config: Any, values: Mapping[str, Any]) -> None:
  """Raises ValueError for a number that is not finite or out of its range."""
  for name, value in values.items():
    if not all(map(math.isfinite, _numbers(value))):
      raise ValueError(f"config.{name}={_text(value)} must be a finite number.")
  for allowed, names in _RANGES.items():
    for name in names.split():
      if not all(map(allowed.contains, _numbers(values.get(name)))):
        raise ValueError(f"config.{name}={_text(values[name])} must be {allowed}.")
  scale = _numbers(values.get("data.augment.scale"))
  if scale and (max(scale) > 1 or scale != sorted(scale)):
    raise ValueError(
      f"config.data.augment.scale={_text(tuple(scale))} must be a smallest and a largest share of "
      "the image, at most 1."
    )
  groups = config.optim.groups
  for row in groups if isinstance(groups, list | tuple) else ():
    fields = {} if isinstance(row, str) else dict(row[1])
    for name in _GROUP_FIELDS:
      for value in _numbers(fields.get(name)):
        if not (math.isfinite(value) and _AMOUNT.contains(value)):
          raise ValueError(
            f"config.optim.groups: {name}={value} of the row {row[0]!r} must be at least 0 and "
            "finite."
          )


def _numbers(value: Any) -> list[float]:
  """Returns the numbers in a value of a config: itself, or those in a tuple."""
  if isinstance(value, list | tuple):
    return [number for item in value for number in _numbers(item)]
  return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def _text(value: Any) -> str:
  return str(tuple(value)) if isinstance(value, list | tuple) else repr(value)


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
