"""Checks of the config of retrieval and pre-training."""

from typing import Any

_GROUP = 64  # Default limit of the rows that negatives are drawn from.
_RERANK_SIMILARITY = ("none", "add", "likelihood")


def check_retrieval(config: Any) -> None:
  """Checks the values that RetrievalTask reads.

  Args:
    config: config of the run.

  Raises:
    ValueError: invalid value; the message names its key.
  """
  has_teacher = config.task.queue > 0
  if has_teacher and not (config.ema.decay and config.ema.use in ("teacher", "both")):
    raise ValueError(
      "Retrieval learns from a teacher: set config.ema.decay (0.995) and config.ema.use=teacher "
      "or both; or config.task.queue=0 and config.task.alpha=0, which need none."
    )
  if config.task.alpha and not has_teacher:
    raise ValueError(
      f"config.task.alpha={config.task.alpha} weighs the targets of a teacher, and "
      "config.task.queue=0 has none: set it to 0."
    )
  if config.optim.accumulate != "global":
    raise ValueError(
      f"config.optim.accumulate={config.optim.accumulate!r}: the contrastive loss compares all "
      "rows of the batch, so microbatches have no means of their own; set it to global."
    )
  if config.task.queue < 0:
    raise ValueError(
      f"config.task.queue={config.task.queue} must not be negative; 0 compares the rows of a "
      "batch alone."
    )
  if config.task.contrast_chunk < 0:
    raise ValueError(
      f"config.task.contrast_chunk={config.task.contrast_chunk} must not be negative; 0: all "
      "columns at once."
    )
  if config.task.rerank_k < 0:
    raise ValueError(
      f"config.task.rerank_k={config.task.rerank_k} must not be negative; 0 ranks by similarity "
      "alone."
    )
  if config.task.rerank_similarity not in _RERANK_SIMILARITY:
    raise ValueError(
      f"config.task.rerank_similarity={config.task.rerank_similarity!r} is not one of "
      f"{', '.join(_RERANK_SIMILARITY)}."
    )
  if config.task.rerank_texts < 1:
    raise ValueError(f"config.task.rerank_texts={config.task.rerank_texts} must be at least 1.")
  if config.task.negatives.ramp_steps and config.task.negatives.greedy:
    raise ValueError(
      f"config.task.negatives.ramp_steps={config.task.negatives.ramp_steps} makes drawn negatives "
      "harder and harder, and with config.task.negatives.greedy=True none are drawn: set one of "
      "the two to 0 or False."
    )


def default_group(rows: int) -> int:
  """Returns the largest divisor of `rows` up to 64, the rows that share hard negatives.

  Args:
    rows: rows of a microbatch.
  """
  return max(n for n in range(1, min(rows, _GROUP) + 1) if rows % n == 0)
