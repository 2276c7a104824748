"""Tasks whose loss compares all rows of a batch, for accumulation in two passes."""

import abc

import jax

from mplug_jax.tasks.base import Task


class ComparingTask(Task):
  """A task with terms over all pairs of rows of a batch, which read a feature vector of each row.

  Its loss is in three parts, so that it can be accumulated: microbatches are encoded one after another for their features alone, these
  are compared over the whole batch, and the second time a microbatch is encoded the gradients of the comparison go on from its features
  (train_step.py). Rows that `rest` reads together are `row_group` consecutive ones, which no microbatch divides.
  """

  row_group = 1

  @abc.abstractmethod
  def encode_rows(self, params, state, batch, rng):
    """-> (what `rest` reads of each row, {name: f32[B, E] features}); every row by itself."""

  @abc.abstractmethod
  def compare(self, params, state, features, batch, rng):
    """Terms over the whole batch -> (terms, metrics, extra, drawn), `drawn` a pytree of arrays [B, ...] that `rest` reads. Reads of
    the parameters what no row has a part in."""

  @abc.abstractmethod
  def rest(self, params, state, encoded, drawn, batch, rng):
    """The other terms -> (terms, metrics)."""

  def loss(self, params, state, batch, rng):
    """See Task.loss."""
    encode_rng, compare_rng, rest_rng = jax.random.split(rng, 3)
    encoded, features = self.encode_rows(params, state, batch, encode_rng)
    terms, metrics, extra, drawn = self.compare(params, state, features, batch, compare_rng)
    others, other_metrics = self.rest(params, state, encoded, drawn, batch, rest_rng)
    return terms | others, metrics | other_metrics, extra
