"""Adafactor with parameter groups."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mplug_jax.optim.groups import Group, clip_factor
from mplug_jax.optim.schedules import Schedule


class AdafactorState(NamedTuple):
  """count i32[] updates done; inner, the state of optax's stages."""

  count: jax.Array
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

  Factored second moments, each array's step clipped to a root mean square of 1 (layers stacked in
  one array share it), momentum `b1`, no scaling by the parameter's size; then
  p -= lr (step + weight_decay p). Arguments as in `adamw`.
  """
  stages = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
  if b1:
    stages.append(optax.ema(b1, debias=False, accumulator_dtype=jnp.dtype(mu_dtype)))

  def trained(tree):
    return jax.tree.structure(tree).unflatten(not group.freeze for group in groups)

  inner = optax.masked(optax.chain(*stages), trained)

  def init(params):
    return AdafactorState(jnp.zeros([], jnp.int32), inner.init(params))

  def update(grads, state, params, *, ok=True):
    factor = clip_factor(jax.tree.leaves(grads), groups, clip)
    steps, inner_state = inner.update(
      jax.tree.map(lambda g: g * factor, grads), state.inner, params
    )
    lrs = {name: schedule(state.count) for name, schedule in schedules.items()}
    leaves, tree = jax.tree.flatten(params)
    updates = [
      jnp.zeros_like(p)
      if g.freeze
      else jnp.where(ok, -lrs[g.name] * (u + g.weight_decay * p), 0.0).astype(p.dtype)
      for u, p, g in zip(jax.tree.leaves(steps), leaves, groups, strict=True)
    ]
    inner_state = jax.tree.map(lambda new, old: jnp.where(ok, new, old), inner_state, state.inner)
    return tree.unflatten(updates), AdafactorState(state.count + ok, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)
