"""AdamW as the official code computes it."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from mplug_jax.optim.groups import Group, clip_factor
from mplug_jax.optim.schedules import Schedule


class AdamWState(NamedTuple):
  """State of `adamw`.

  Attributes:
    count: i32[], number of updates done.
    mu: first moments, a tree like the parameters, optax.MaskedNode where frozen.
    nu: second moments, like `mu`.
  """

  count: Int[Array, ""]
  mu: Any
  nu: Any


def _zero_moments(params: Any, groups: list[Group], dtype: Any) -> Any:
  """Returns zeros like the parameters, optax.MaskedNode for frozen ones."""
  leaves, tree = jax.tree.flatten(params)
  return tree.unflatten(
    optax.MaskedNode() if group.freeze else jnp.zeros_like(p, dtype)
    for p, group in zip(leaves, groups, strict=True)
  )


@functools.partial(jax.jit, static_argnames=("b1", "b2", "eps", "weight_decay"))
def _step(p, g, mu, nu, lr, factor, mu_scale, nu_scale, ok, *, b1, b2, eps, weight_decay):
  """Returns (update, moments) of a parameter; jitted: one trace for all of a shape."""
  g = g.astype(jnp.float32) * factor
  old = mu.astype(jnp.float32)
  m = jnp.where(ok, b1 * old + (1.0 - b1) * g, old)
  v = jnp.where(ok, b2 * nu + (1.0 - b2) * jnp.square(g), nu)
  direction = m * mu_scale / (jnp.sqrt(v * nu_scale) + eps)
  update = -lr * (direction + weight_decay * p)
  return update.astype(p.dtype), m.astype(mu.dtype), v


def adamw(
  groups: list[Group],
  schedules: dict[str, Schedule],
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  mu_dtype: str = "float32",
  clip: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  """AdamW with groups, without intermediate trees (Loshchilov and Hutter 2019, Algorithm 2).

  p -= lr (m_hat / (sqrt(v_hat) + eps) + weight_decay p), the form of torch.optim.AdamW. Gradients
  are first scaled to a global norm of at most `clip`. Frozen parameters have no moments and do not
  count in the norm.

  Args:
    groups: group of each parameter, in the order of jax.tree.leaves.
    schedules: {group name: learning rate as a function of the number of updates done}.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: constant of the denominator.
    mu_dtype: dtype in which the first moment is kept; arithmetic is float32.
    clip: largest global norm of the gradients; None for no clipping.
  """

  def init(params: Any) -> AdamWState:
    mu = _zero_moments(params, groups, jnp.dtype(mu_dtype))
    nu = _zero_moments(params, groups, jnp.float32)
    return AdamWState(jnp.zeros([], jnp.int32), mu, nu)

  def update(
    updates: Any, state: Any, params: Any = None, *, ok: Any = True
  ) -> tuple[Any, AdamWState]:
    leaves, tree = jax.tree.flatten(params)
    grads, mu, nu = (tree.flatten_up_to(x) for x in (updates, state.mu, state.nu))
    factor = clip_factor(grads, groups, clip)
    # The update is made from moments that already depend on `ok`. If it were selected afterwards,
    # XLA would copy both moments of every parameter before it overwrites them, which needs the
    # memory of two more models.
    lrs = {name: jnp.where(ok, schedule(state.count), 0.0) for name, schedule in schedules.items()}
    # 1 - b^t without the cancellation that costs four digits at t = 1.
    mu_scale, nu_scale = (-1.0 / jnp.expm1((state.count + 1) * math.log(b)) for b in (b1, b2))
    step = functools.partial(_step, b1=b1, b2=b2, eps=eps)
    steps = [jnp.zeros_like(p) for p in leaves]
    for i, (p, group) in enumerate(zip(leaves, groups, strict=True)):
      if group.freeze:
        continue
      steps[i], mu[i], nu[i] = step(
        *(p, grads[i], mu[i], nu[i], lrs[group.name], factor, mu_scale, nu_scale, ok),
        weight_decay=group.weight_decay,
      )
    return tree.unflatten(steps), AdamWState(
      state.count + ok, tree.unflatten(mu), tree.unflatten(nu)
    )

  return optax.GradientTransformationExtraArgs(init, update)
