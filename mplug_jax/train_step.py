"""One update as a pure function: microbatches, loss division over the global batch, optimizer, EMA, finiteness."""

import jax
import jax.numpy as jnp
import optax

from mplug_jax import sharding, train_state


def split_microbatches(batch, count):
  """[B, ...] -> [count, B / count, ...] for every array; strided, so that no row changes its device."""
  def split(x):
    x = x.reshape((-1, count) + x.shape[1:]).swapaxes(0, 1)
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(None, sharding.BATCH_AXES))
  return jax.tree.map(split, batch)


def make_gradients(task, microbatches=1, accumulate="global"):
  """Function (state, batch) -> (gradients, loss f32[], {metric: (sum, count)}, extra).

  The loss is the sum over terms of coefficient x total / weight with totals and weights over the whole global batch,
  whatever the number of microbatches. `accumulate="mean_of_means"` divides inside each microbatch and averages, as the
  official accumulation does (docs/official.md item 51).
  """
  def scaled_loss(params, state, batch, rng, weights):
    terms, metrics, extra = task.loss(params, state, batch, rng)
    loss = sum(task.coefficients.get(k, 1.0) * total / jnp.where(weights[k] > 0, weights[k], 1.0) for k, total in terms.items())
    shown = {k: (total, jnp.asarray(weights[k], jnp.float32)) for k, total in terms.items()}
    return loss, (metrics, shown, extra)

  def gradients(state, batch):
    rng = jax.random.fold_in(state.rng, state.step)
    value_and_grad = jax.value_and_grad(scaled_loss, has_aux=True)
    if microbatches == 1:
      key = jax.random.fold_in(rng, 0)
      weights = task.weights(batch, key)
      (loss, (metrics, shown, extra)), grads = value_and_grad(state.params, state, batch, key, weights)
      return grads, loss, metrics | _loss_metrics(shown), extra

    micro = split_microbatches(batch, microbatches)
    keys = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(microbatches))
    each = jax.vmap(task.weights)(micro, keys)
    counts = jax.tree.map(jnp.sum, each)
    if accumulate == "global":
      each = jax.tree.map(lambda w, count: jnp.broadcast_to(count, w.shape), each, counts)
    else:
      each = jax.tree.map(lambda w: w * microbatches, each)

    def body(carry, inputs):
      grads, loss, extra = carry
      batch, key, weights = inputs
      (value, (metrics, shown, extra)), new = value_and_grad(
          state.params, state.replace(extra=extra), batch, key, weights)
      return (jax.tree.map(jnp.add, grads, new), loss + value, extra), (metrics, shown)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (grads, loss, extra), (metrics, shown) = jax.lax.scan(body, (zeros, jnp.float32(0.0), state.extra), (micro, keys, each))
    metrics = jax.tree.map(lambda x: x.sum(0), metrics)
    shown = {k: (total.sum(), jnp.asarray(counts[k], jnp.float32)) for k, (total, _) in shown.items()}
    return grads, loss, metrics | _loss_metrics(shown), extra

  return gradients


def _loss_metrics(shown):
  return {f"loss_{k}": pair for k, pair in shown.items()}


def make_train_step(task, optimizer, *, microbatches=1, accumulate="global", ema_decay=0.0, ema_include=".*"):
  """Function (state, batch, healthy bool[]) -> (state, metrics, health).

  An update whose loss or gradients are not finite is not applied, nor is any after it: `health["ok"]` of a step is the next
  one's `healthy`, so the state stays the last good one until the loop looks. `health["bad_leaf"]` i32[] numbers the
  first gradient leaf that is not finite, -1 if it is the loss alone.
  """
  gradients = make_gradients(task, microbatches, accumulate)

  def train_step(state, batch, healthy):
    grads, loss, metrics, extra = gradients(state, batch)
    squares = jnp.stack([jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)])
    bad = ~jnp.isfinite(squares)
    ok = healthy & jnp.isfinite(loss) & ~bad.any()
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, ok=ok)
    params = task.project(optax.apply_updates(state.params, updates))
    ema = state.ema_params
    if ema_decay:
      ema = train_state.blend_ema(ema, params, jnp.where(ok, ema_decay, 1.0), ema_include)
    extra = jax.tree.map(lambda new, old: jnp.where(ok, new, old), extra, state.extra)
    new = state.replace(step=state.step + ok, params=params, opt_state=opt_state, ema_params=ema, extra=extra)
    metrics |= {"loss": (loss, jnp.float32(1.0)), "gradient_norm": (jnp.sqrt(squares.sum()), jnp.float32(1.0))}
    return new, metrics, {"ok": ok, "bad_leaf": jnp.where(bad.any(), jnp.argmax(bad), -1)}

  return train_step
