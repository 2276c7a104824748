"""Adafactor with parameter groups."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from mplug_jax.optim.groups import Group, clip_factor
from mplug_jax.optim.schedules import Schedule


class AdafactorState(NamedTuple):
  """State of `adafactor`.

  Attributes:
    count: i32[], number of updates done.
    inner: state of optax's stages.
  """

  count: Int[Array, ""]
  inner: Any


def adafactor(
  groups: list[Group],
  schedules: dict[str, Schedule],
  *,
  b1: float = 0.9,
  mu_dtype: str = "float32",
  clip: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Adafactor with momentum, at Adam's learning rates (Shazeer and Stern 2018; Zhai et al. 2022).

  Factored second moments, the step of each array clipped to a root mean square of 1 (layers stacked
  in one array share it), momentum `b1`, no scaling by the size of the parameter; then
  p -= lr (step + weight_decay p).

  Args:
    groups: group of each parameter, in the order of jax.tree.leaves.
    schedules: {group name: learning rate as a function of the number of updates done}.
    b1: decay of the momentum; 0 for none.
    mu_dtype: dtype in which the momentum is kept.
    clip: largest global norm of the gradients; None for no clipping.
  """
  stages = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
  if b1:
    stages.append(optax.ema(b1, debias=False, accumulator_dtype=jnp.dtype(mu_dtype)))

  def trained(tree: Any) -> Any:
    return jax.tree.structure(tree).unflatten(not group.freeze for group in groups)

  inner = optax.masked(optax.chain(*stages), trained)

  def init(params: Any) -> AdafactorState:
    return AdafactorState(jnp.zeros([], jnp.int32), inner.init(params))

  def update(
    updates: Any, state: Any, params: Any = None, *, ok: Any = True
  ) -> tuple[Any, AdafactorState]:
    factor = clip_factor(jax.tree.leaves(updates), groups, clip)
    directions, inner_state = inner.update(
      jax.tree.map(lambda g: g * factor, updates), state.inner, params
    )
    lrs = {name: schedule(state.count) for name, schedule in schedules.items()}
    leaves, tree = jax.tree.flatten(params)
    steps = [
      jnp.zeros_like(p)
      if g.freeze
      else jnp.where(ok, -lrs[g.name] * (u + g.weight_decay * p), 0.0).astype(p.dtype)
      for u, p, g in zip(jax.tree.leaves(directions), leaves, groups, strict=True)
    ]
    inner_state = jax.tree.map(lambda new, old: jnp.where(ok, new, old), inner_state, state.inner)
    return tree.unflatten(steps), AdafactorState(state.count + ok, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)
