"""Tasks whose loss compares all rows of a batch, for gradient accumulation in two passes."""

import abc
from typing import Any, TypeAlias

import jax
from jaxtyping import Float, PRNGKeyArray

from mplug_jax.arrays import Array
from mplug_jax.tasks.base import Batch, Metrics, Params, Task, Terms

# {name: unit vectors f32[B, E]}
Features: TypeAlias = dict[str, Float[Array, "batch features"]]


class ComparingTask(Task):
  """Task with loss terms over all pairs of rows of a batch, which read a feature vector per row.

  The loss has three parts, so that it can be accumulated over microbatches: microbatches are
  encoded one after another for their features, the features are compared over the whole batch, and
  microbatches are encoded again to carry the gradients of the comparison on from their features
  (training/step.py).

  Attributes:
    row_group: consecutive rows that `rest` reads together; no microbatch divides them.
  """

  row_group = 1

  @abc.abstractmethod
  def encode_rows(
    self, params: Params, state: Any, batch: Batch, rng: PRNGKeyArray
  ) -> tuple[Any, Features]:
    """Encodes every row independently of the others.

    Args:
      params: parameters.
      state: TrainState.
      batch: rows of a microbatch.
      rng: random key.

    Returns:
      What `rest` reads of each row, and {name: f32[B, E]} features.
    """

  @abc.abstractmethod
  def compare(
    self, params: Params, state: Any, features: Features, batch: Batch, rng: PRNGKeyArray
  ) -> tuple[Terms, Metrics, Any, Any]:
    """Loss terms over the whole batch.

    Args:
      params: parameters; only those that no row's encoding reads may be used.
      state: TrainState.
      features: see `encode_rows`.
      batch: all rows.
      rng: random key.

    Returns:
      (terms, metrics, extra state, pytree of arrays [B, ...] that `rest` reads).
    """

  @abc.abstractmethod
  def rest(
    self, params: Params, state: Any, encoded: Any, drawn: Any, batch: Batch, rng: PRNGKeyArray
  ) -> tuple[Terms, Metrics]:
    """The other loss terms.

    Args:
      params: parameters.
      state: TrainState.
      encoded: first result of `encode_rows`.
      drawn: last result of `compare`.
      batch: rows of a microbatch.
      rng: random key.

    Returns:
      (terms, metrics).
    """

  def loss(
    self, params: Params, state: Any, batch: Batch, rng: PRNGKeyArray
  ) -> tuple[Terms, Metrics, Any]:
    """See Task.loss."""
    encode_rng, compare_rng, rest_rng = jax.random.split(rng, 3)
    encoded, features = self.encode_rows(params, state, batch, encode_rng)
    terms, metrics, extra, drawn = self.compare(params, state, features, batch, compare_rng)
    others, other_metrics = self.rest(params, state, encoded, drawn, batch, rest_rng)
    return terms | others, metrics | other_metrics, extra
