"""Loss terms divided by their normalizers, and their metrics."""

import jax.numpy as jnp


def scale_terms(task, terms, loss_normalizers):
  """-> (loss f32[], {term: (total, weight)})."""
  loss = sum(
    task.coefficients.get(k, 1.0)
    * total
    / jnp.where(loss_normalizers[k] > 0, loss_normalizers[k], 1.0)
    for k, total in terms.items()
  )
  return loss, {
    k: (total, jnp.asarray(loss_normalizers[k], jnp.float32)) for k, total in terms.items()
  }


def loss_metrics(shown):
  return {f"loss_{k}": pair for k, pair in shown.items()}
