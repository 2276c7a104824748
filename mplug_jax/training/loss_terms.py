"""Loss terms divided by their normalizers, and their metrics."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from mplug_jax.tasks.base import Metrics, Task, Terms


def scale_terms(
  task: Task, terms: Terms, loss_normalizers: Terms
) -> tuple[Float[Array, ""], Metrics]:
  """Sums the loss terms, each multiplied by its coefficient and divided by its normalizer.

  Args:
    task: task with the coefficients.
    terms: {term: its sum over the rows, f32[]}.
    loss_normalizers: {term: divisor, f32[]}; a term whose divisor is 0 is not divided.

  Returns:
    The loss f32[], and {term: (sum, divisor)}.
  """
  loss: Any = sum(
    task.coefficients.get(name, 1.0)
    * total
    / jnp.where(loss_normalizers[name] > 0, loss_normalizers[name], 1.0)
    for name, total in terms.items()
  )
  return loss, {
    name: (total, jnp.asarray(loss_normalizers[name], jnp.float32)) for name, total in terms.items()
  }


def loss_metrics(shown: Mapping[str, tuple[Any, Any]]) -> Metrics:
  """Returns the metrics of the loss terms, with "loss_" before their names.

  Args:
    shown: {term: (sum, divisor)}, see `scale_terms`.
  """
  return {f"loss_{name}": pair for name, pair in shown.items()}
