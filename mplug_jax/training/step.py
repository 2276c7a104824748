"""One update as a pure function: gradients of the global batch, optimizer, averages, finiteness."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from mplug_jax.tasks.base import Batch, Metrics, Task
from mplug_jax.training import state as train_state
from mplug_jax.training.gradients import make_gradients
from mplug_jax.training.state import TrainState

# {"ok": bool[], "bad_leaf": i32[]}
Health: TypeAlias = dict[str, Any]
# Function (state, batch, healthy bool[]) -> (state, metrics, health).
TrainStep: TypeAlias = Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics, Health]]


def make_train_step(
  task: Task,
  optimizer: optax.GradientTransformationExtraArgs,
  *,
  microbatches: int = 1,
  accumulate: str = "global",
  ema_decay: float = 0.0,
  ema_include: str = ".*",
) -> TrainStep:
  """Returns the train step, a function (state, batch, healthy bool[]) -> (state, metrics, health).

  An update whose loss or gradients are not finite is not applied, and neither is any after it:
  `health["ok"]` of a step is `healthy` of the next one, so that the state remains the last good
  one until the loop checks. `health["bad_leaf"]`, i32[], is the number of the first gradient leaf
  that is not finite, -1 if only the loss is not.

  Args:
    task: task of the run.
    optimizer: result of optim.make.
    microbatches: number of parts of a batch whose gradients are accumulated.
    accumulate: see `make_gradients`.
    ema_decay: decay of the averaged parameters; 0 for none.
    ema_include: regex of the parameters to average.
  """
  gradients = make_gradients(task, microbatches, accumulate)

  def train_step(
    state: TrainState, batch: Batch, healthy: Bool[Array, ""]
  ) -> tuple[TrainState, Metrics, Health]:
    grads, loss, metrics, extra = gradients(state, batch)
    squares = jnp.stack(
      [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)]
    )
    bad = ~jnp.isfinite(squares)
    ok = healthy & jnp.isfinite(loss) & ~bad.any()
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, ok=ok)
    params = task.project(optax.apply_updates(state.params, updates))
    ema = state.ema_params
    if ema_decay:
      ema = train_state.blend_ema(ema, params, jnp.where(ok, ema_decay, 1.0), ema_include)
    extra = jax.tree.map(lambda new, old: jnp.where(ok, new, old), extra, state.extra)
    new = state.replace(
      step=state.step + ok, params=params, opt_state=opt_state, ema_params=ema, extra=extra
    )
    metrics |= {
      "loss": (loss, jnp.float32(1.0)),
      "gradient_norm": (jnp.sqrt(squares.sum()), jnp.float32(1.0)),
    }
    return new, metrics, {"ok": ok, "bad_leaf": jnp.where(bad.any(), jnp.argmax(bad), -1)}

  return train_step
