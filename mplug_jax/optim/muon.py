"""Muon: updates whose singular values are all about 1 (Jordan et al. 2024; Liu et al. 2025).

With Adam, the few strong directions of a matrix's gradient dominate the weak ones, and the weak
ones relate a color in a question to that color in the image. From random initialization Muon needs
a third of the updates for that.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mplug_jax.optim.groups import Group
from mplug_jax.optim.schedules import Schedule

ITERATIONS = 5
# Coefficients of the odd polynomial that drives singular values towards 1 (Jordan et al.).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Root mean square of an update, as is usual for AdamW's, so that learning rates carry over (Liu et
# al. 2025, section 2.2).
_RMS = 0.2


class MuonState(NamedTuple):
  """State of `muon`.

  Attributes:
    count: i32[], number of updates done.
    momentum: tree of the matrices' momenta, optax.MaskedNode elsewhere.
    rest: state of the optimizer of the other parameters.
  """

  count: Int[Array, ""]
  momentum: Any
  rest: Any


def orthogonalize(
  x: Float[Array, "matrices rows columns"],
) -> Float[Array, "matrices rows columns"]:
  """Maps each matrix U S V^T to about U V^T, with singular values between 0.7 and 1.2.

  The Newton-Schulz iteration consists of matrix products, so it is as fast on TPU as a layer.

  Args:
    x: f32[N, A, B].

  Returns:
    f32[N, A, B].
  """
  a, b, c = _COEFFICIENTS
  wide = x.shape[1] <= x.shape[2]
  x = x if wide else x.swapaxes(1, 2)
  x = x / (jnp.sqrt(jnp.square(x).sum((1, 2), keepdims=True)) + 1e-7)
  for _ in range(ITERATIONS):
    gram = jnp.einsum("nij,nkj->nik", x, x)
    x = a * x + jnp.einsum("nij,njk->nik", b * gram + c * jnp.einsum("nij,njk->nik", gram, gram), x)
  return x if wide else x.swapaxes(1, 2)


def _directions(momenta: Sequence[jax.Array]) -> list[jax.Array]:
  """Returns the updates f32[..., A, B] of matrices before the learning rate.

  Matrices of equal shape are orthogonalized together.
  """
  by_shape: dict[tuple[int, ...], list[int]] = {}
  for i, x in enumerate(momenta):
    by_shape.setdefault(x.shape[-2:], []).append(i)
  directions = list(momenta)
  for shape, indices in by_shape.items():
    stacked = jnp.concatenate([momenta[i].reshape((-1,) + shape) for i in indices])
    parts = orthogonalize(stacked) * (_RMS * math.sqrt(max(shape)))
    start = 0
    for i in indices:
      count = math.prod(momenta[i].shape[:-2])
      directions[i] = parts[start : start + count].reshape(momenta[i].shape)
      start += count
  return directions


def _split(tree: Any, matrices: Sequence[bool], keep_matrices: bool) -> Any:
  """Returns the tree with optax.MaskedNode for the matrices, or for all other leaves."""
  leaves, structure = jax.tree.flatten(tree)
  return structure.unflatten(
    x if matrix == keep_matrices else optax.MaskedNode()
    for x, matrix in zip(leaves, matrices, strict=True)
  )


def _ahead(
  momenta: Sequence[jax.Array], grads: Sequence[jax.Array], decay: float
) -> list[jax.Array]:
  """Returns decay x momentum + (1 - decay) x gradient of each matrix."""
  return [decay * m + (1.0 - decay) * g for m, g in zip(momenta, grads, strict=True)]


def muon(
  rest: optax.GradientTransformationExtraArgs,
  matrices: Sequence[bool],
  groups: Sequence[Group],
  schedules: dict[str, Schedule],
  *,
  momentum: float = 0.95,
  clip_factor: Callable[[list[jax.Array]], Float[Array, ""] | float],
) -> optax.GradientTransformationExtraArgs:
  """Muon for matrices, another optimizer for all other parameters.

  m <- momentum m + (1 - momentum) g
  p <- p - lr (0.2 sqrt(max(A, B)) orthogonal(momentum m + (1 - momentum) g) + weight_decay p)

  optax.contrib.muon (0.2.8) is not used: its bias correction changes updates by up to 51% from the
  second one on, so that earlier runs would not resume exactly, and it compiles 1.6 times as long,
  because it orthogonalizes matrices one by one.

  Args:
    rest: optimizer of the other parameters; gets optax.MaskedNode for matrices.
    matrices: whether each parameter is a trained kernel, f32[A, B] or f32[depth, A, B].
    groups: group of each parameter.
    schedules: {group name: learning rate as a function of the number of updates done}.
    momentum: decay of the momentum.
    clip_factor: function (list of gradients) -> f32[], their multiplier.
  """

  def others_of(tree: Any) -> Any:
    return _split(tree, matrices, keep_matrices=False)

  def init(params: Any) -> MuonState:
    zeros = jax.tree.map(jnp.zeros_like, _split(params, matrices, keep_matrices=True))
    return MuonState(jnp.zeros([], jnp.int32), zeros, rest.init(others_of(params)))

  def update(
    updates: Any, state: Any, params: Any = None, *, ok: Any = True
  ) -> tuple[Any, MuonState]:
    leaves, structure = jax.tree.flatten(params)
    grads = jax.tree.leaves(updates)
    factor = clip_factor(grads)
    grads = [g * factor for g in grads]
    other_updates, rest_state = rest.update(
      others_of(structure.unflatten(grads)), state.rest, others_of(params), ok=ok
    )
    old, matrix_tree = jax.tree.flatten(state.momentum)
    matrix_grads = [g for g, matrix in zip(grads, matrices, strict=True) if matrix]
    new = _ahead(old, matrix_grads, momentum)
    directions = iter(_directions(_ahead(new, matrix_grads, momentum)))
    others = iter(jax.tree.leaves(other_updates))
    lrs = {name: schedule(state.count) for name, schedule in schedules.items()}
    steps = [
      jnp.where(ok, -lrs[group.name] * (next(directions) + group.weight_decay * p), 0.0)
      if matrix
      else next(others)
      for p, group, matrix in zip(leaves, groups, matrices, strict=True)
    ]
    kept = matrix_tree.unflatten(jnp.where(ok, m, m_old) for m, m_old in zip(new, old, strict=True))
    return structure.unflatten(steps), MuonState(state.count + ok, kept, rest_state)

  return optax.GradientTransformationExtraArgs(init, update)
