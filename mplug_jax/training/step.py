"""One update as a pure function: microbatches, loss division over the global batch, optimizer, EMA, finiteness."""

import functools

import jax
import jax.numpy as jnp
import optax

from mplug_jax.parallel import batches
from mplug_jax.tasks import base
from mplug_jax.training import state as train_state


def make_gradients(task, microbatches=1, accumulate="global"):
  """Function (state, batch) -> (gradients, loss f32[], {metric: (sum, count)}, extra).

  The loss is the sum over terms of coefficient x total / weight with totals and weights over the whole global batch,
  whatever the number of microbatches. `accumulate="mean_of_means"` divides inside each microbatch and averages, as the
  official accumulation does (docs/official.md item 51).
  A task that compares the rows of a batch goes through its microbatches twice, see `_in_two_passes`.
  """
  if microbatches > 1 and isinstance(task, base.ComparingTask):
    return functools.partial(_in_two_passes, task, microbatches)

  def scaled_loss(params, state, batch, rng, weights):
    terms, metrics, extra = task.loss(params, state, batch, rng)
    loss, shown = _scale(task, terms, weights)
    return loss, (metrics, shown, extra)

  def gradients(state, batch):
    rng = jax.random.fold_in(state.rng, state.step)
    value_and_grad = jax.value_and_grad(scaled_loss, has_aux=True)
    if microbatches == 1:
      key = jax.random.fold_in(rng, 0)
      weights = task.weights(batch, key)
      (loss, (metrics, shown, extra)), grads = value_and_grad(
        state.params, state, batch, key, weights
      )
      return grads, loss, metrics | _loss_metrics(shown), extra

    micro = batches.split_rows(batch, microbatches)
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
        state.params, state.replace(extra=extra), batch, key, weights
      )
      return (jax.tree.map(jnp.add, grads, new), loss + value, extra), (metrics, shown)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (grads, loss, extra), (metrics, shown) = jax.lax.scan(
      body, (zeros, jnp.float32(0.0), state.extra), (micro, keys, each)
    )
    metrics = jax.tree.map(lambda x: x.sum(0), metrics)
    shown = {
      k: (total.sum(), jnp.asarray(counts[k], jnp.float32)) for k, (total, _) in shown.items()
    }
    return grads, loss, metrics | _loss_metrics(shown), extra

  return gradients


def _in_two_passes(task, microbatches, state, batch):
  """As the function of `make_gradients`, for a base.ComparingTask.

  The first pass keeps nothing of a microbatch but its features. They are compared over the whole batch, which gives the terms of the
  comparison and their slopes: derivatives with respect to the features. The second pass adds to the other terms of a microbatch the
  product of its features with these slopes, whose gradient is what the comparison's would be through all microbatches at once.
  """
  rng = jax.random.fold_in(state.rng, state.step)
  whole_key = jax.random.fold_in(rng, 0)
  weights, group = task.weights(batch, whole_key), task.row_group
  keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(rng, i), 3))(
    jnp.arange(microbatches)
  )  # as base.ComparingTask.loss
  micro = batches.split_rows(batch, microbatches, group)

  def features_of(_, inputs):
    part, key = inputs
    return None, task.encode_rows(state.params, state, part, key[0])[1]

  features = batches.join_rows(jax.lax.scan(features_of, None, (micro, keys))[1], group)

  def compared(params, features):
    terms, metrics, extra, drawn = task.compare(
      params, state, features, batch, jax.random.split(whole_key, 3)[1]
    )
    loss, shown = _scale(task, terms, weights)
    return loss, (metrics, shown, extra, drawn)

  (loss, (metrics, shown, extra, drawn)), (grads, slopes) = jax.value_and_grad(
    compared, (0, 1), has_aux=True
  )(state.params, features)

  def part_loss(params, part, key, drawn, slopes):
    encoded, features = task.encode_rows(params, state, part, key[0])
    terms, metrics = task.rest(params, state, encoded, drawn, part, key[2])
    loss, shown = _scale(task, terms, weights)
    pull = sum(jnp.vdot(features[name], slope) for name, slope in slopes.items())
    return loss + pull, (loss, metrics, shown)

  def add(grads, inputs):
    new, out = jax.grad(part_loss, has_aux=True)(state.params, *inputs)
    return jax.tree.map(jnp.add, grads, new), out

  drawn, slopes = batches.split_rows((drawn, slopes), microbatches, group)
  grads, (losses, other_metrics, others) = jax.lax.scan(add, grads, (micro, keys, drawn, slopes))
  other_metrics = jax.tree.map(lambda x: x.sum(0), other_metrics)
  shown |= {k: (total.sum(), weight[0]) for k, (total, weight) in others.items()}
  return grads, loss + losses.sum(), metrics | other_metrics | _loss_metrics(shown), extra


def _scale(task, terms, weights):
  """-> (loss f32[], {term: (total, weight)})."""
  loss = sum(
    task.coefficients.get(k, 1.0) * total / jnp.where(weights[k] > 0, weights[k], 1.0)
    for k, total in terms.items()
  )
  return loss, {k: (total, jnp.asarray(weights[k], jnp.float32)) for k, total in terms.items()}


def _loss_metrics(shown):
  return {f"loss_{k}": pair for k, pair in shown.items()}


def make_train_step(
  task, optimizer, *, microbatches=1, accumulate="global", ema_decay=0.0, ema_include=".*"
):
  """Function (state, batch, healthy bool[]) -> (state, metrics, health).

  An update whose loss or gradients are not finite is not applied, nor is any after it: `health["ok"]` of a step is the next
  one's `healthy`, so the state stays the last good one until the loop looks. `health["bad_leaf"]` i32[] numbers the
  first gradient leaf that is not finite, -1 if it is the loss alone.
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
