"""Gradients of a task's loss over the microbatches of a batch."""

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from mplug_jax.parallel import batches
from mplug_jax.tasks import two_pass
from mplug_jax.tasks.base import Batch, Task
from mplug_jax.training.gradient_cache import GradientsAndLoss, cached_gradients
from mplug_jax.training.loss_terms import loss_metrics, scale_terms
from mplug_jax.training.state import TrainState

GradientsFn: TypeAlias = Callable[[TrainState, Batch], GradientsAndLoss]


def make_gradients(task: Task, microbatches: int = 1, accumulate: str = "global") -> GradientsFn:
  """Returns a function (state, batch) -> (gradients, loss f32[], {metric: (sum, count)}, extra).

  The loss is the sum over terms of coefficient x total / loss normalizer. Totals and normalizers
  cover the global batch, whatever the number of microbatches. A task that compares the rows of a
  batch encodes its microbatches twice, see `cached_gradients`.

  Args:
    task: task of the run.
    microbatches: number of parts of a batch whose gradients are added.
    accumulate: "global", or "mean_of_means" to average the means of microbatches, as the official
      code does (docs/official.md item 51).
  """
  if microbatches > 1 and isinstance(task, two_pass.ComparingTask):
    return functools.partial(cached_gradients, task, microbatches)

  def scaled_loss(params, state, batch, rng, loss_normalizers):
    terms, metrics, extra = task.loss(params, state, batch, rng)
    loss, shown = scale_terms(task, terms, loss_normalizers)
    return loss, (metrics, shown, extra)

  def gradients(state: TrainState, batch: Batch) -> GradientsAndLoss:
    rng = jax.random.fold_in(state.rng, state.step)
    value_and_grad = jax.value_and_grad(scaled_loss, has_aux=True)
    if microbatches == 1:
      key = jax.random.fold_in(rng, 0)
      loss_normalizers = task.loss_normalizers(batch, key)
      (loss, (metrics, shown, extra)), grads = value_and_grad(
        state.params, state, batch, key, loss_normalizers
      )
      return grads, loss, metrics | loss_metrics(shown), extra

    micro = batches.split_rows(batch, microbatches)
    keys = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(microbatches))
    normalizers = jax.vmap(task.loss_normalizers)(micro, keys)
    counts = jax.tree.map(jnp.sum, normalizers)
    if accumulate == "global":
      normalizers = jax.tree.map(
        lambda part, count: jnp.broadcast_to(count, part.shape), normalizers, counts
      )
    else:
      normalizers = jax.tree.map(lambda part: part * microbatches, normalizers)

    def body(carry, inputs):
      grads, loss, extra = carry
      batch, key, loss_normalizers = inputs
      (value, (metrics, shown, extra)), new = value_and_grad(
        state.params, state.replace(extra=extra), batch, key, loss_normalizers
      )
      return (jax.tree.map(jnp.add, grads, new), loss + value, extra), (metrics, shown)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (grads, loss, extra), (metrics, shown) = jax.lax.scan(
      body, (zeros, jnp.float32(0.0), state.extra), (micro, keys, normalizers)
    )
    metrics = jax.tree.map(lambda x: x.sum(0), metrics)
    shown = {k: (total.sum(), counts[k].astype(jnp.float32)) for k, (total, _) in shown.items()}
    return grads, loss, metrics | loss_metrics(shown), extra

  return gradients
