"""One update as a pure function: microbatches, loss division over the global batch, optimizer, EMA, finiteness."""

import jax
import jax.numpy as jnp
import optax

from mplug_jax.training import state as train_state
from mplug_jax.training.gradients import make_gradients


def make_train_step(
  task, optimizer, *, microbatches=1, accumulate="global", ema_decay=0.0, ema_include=".*"
):
  """Function (state, batch, healthy bool[]) -> (state, metrics, health).

  An update whose loss or gradients are not finite is not applied, nor is any after it:
    `health["ok"]` of a step is the next
  one's `healthy`, so the state stays the last good one until the loop looks. `health["bad_leaf"]`
  i32[] numbers the first gradient leaf that is not finite, -1 if it is the loss alone.
  """
  gradients = make_gradients(task, microbatches, accumulate)

  def train_step(state, batch, healthy):
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
