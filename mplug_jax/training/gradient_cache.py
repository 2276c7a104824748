"""GradCache: contrastive losses over a whole batch, computed in microbatches with two passes.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mplug_jax.parallel import batches
from mplug_jax.tasks.base import Batch, Metrics
from mplug_jax.tasks.two_pass import ComparingTask
from mplug_jax.training.loss_terms import loss_metrics, scale_terms
from mplug_jax.training.state import TrainState

# (tree of gradients, loss, metrics, new state of the task)
GradientsAndLoss: TypeAlias = tuple[Any, Float[Array, ""], Metrics, Any]


def cached_gradients(
  task: ComparingTask, microbatches: int, state: TrainState, batch: Batch
) -> GradientsAndLoss:
  """Computes the gradients of a loss that compares all rows of a batch, in microbatches.

  The first pass caches the representations (`features`) of every microbatch. The loss terms that
  compare rows are computed from those of the whole batch, which gives representation gradients. The
  second pass encodes each microbatch again and adds to its other terms the product of its
  representations with their gradients: the gradient of this product is that of the comparison.

  Args:
    task: task of the run.
    microbatches: number of parts of the batch.
    state: state before the update.
    batch: rows of the global batch.

  Returns:
    Gradients, loss f32[], {metric: (sum, count)}, new state of the task.
  """
  rng = jax.random.fold_in(state.rng, state.step)
  whole_key = jax.random.fold_in(rng, 0)
  loss_normalizers = task.loss_normalizers(batch, whole_key)
  group = task.row_group
  # The keys of ComparingTask.loss.
  numbers = jnp.arange(microbatches)
  keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(rng, i), 3))(numbers)
  micro = batches.split_rows(batch, microbatches, group)

  def features_of(_, inputs):
    part, key = inputs
    return None, task.encode_rows(state.params, state, part, key[0])[1]

  features = batches.join_rows(jax.lax.scan(features_of, None, (micro, keys))[1], group)

  def compared(params, features):
    key = jax.random.split(whole_key, 3)[1]
    terms, metrics, extra, drawn = task.compare(params, state, features, batch, key)
    loss, shown = scale_terms(task, terms, loss_normalizers)
    return loss, (metrics, shown, extra, drawn)

  (loss, (metrics, shown, extra, drawn)), (grads, representation_grads) = jax.value_and_grad(
    compared, (0, 1), has_aux=True
  )(state.params, features)

  def part_loss(params, part, key, drawn, representation_grads):
    encoded, features = task.encode_rows(params, state, part, key[0])
    terms, metrics = task.rest(params, state, encoded, drawn, part, key[2])
    loss, shown = scale_terms(task, terms, loss_normalizers)
    product = sum(jnp.vdot(features[name], grad) for name, grad in representation_grads.items())
    return loss + product, (loss, metrics, shown)

  def add(grads, inputs):
    new, out = jax.grad(part_loss, has_aux=True)(state.params, *inputs)
    return jax.tree.map(jnp.add, grads, new), out

  parts = batches.split_rows((drawn, representation_grads), microbatches, group)
  grads, (losses, other_metrics, others) = jax.lax.scan(add, grads, (micro, keys, *parts))
  other_metrics = jax.tree.map(lambda x: x.sum(0), other_metrics)
  shown |= {k: (total.sum(), weight[0]) for k, (total, weight) in others.items()}
  return grads, loss + losses.sum(), metrics | other_metrics | loss_metrics(shown), extra
