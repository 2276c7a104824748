"""One update on a task small enough to compute by hand.

Division of losses, random keys, microbatches, averages and the guard against values that are not
finite.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from mplug_jax import optim
from mplug_jax.parallel import batches
from mplug_jax.parallel import mesh as mesh_lib
from mplug_jax.training import gradients as gradients_lib
from mplug_jax.training import health as health_lib
from mplug_jax.training import step as step_lib
from mplug_jax.training.state import TrainState
from tests.support import tiny_run


class Regression:
  """Weighted least squares in two parameters, a task small enough to compute by hand.

  `noise` = (sum, count) of a draw per call makes the random keys visible; `extra` counts the calls.
  """

  coefficients = {"fit": 2.0}

  def loss_normalizers(self, batch, rng):
    return {"fit": batch["weight"].sum()}

  def loss(self, params, state, batch, rng):
    prediction = batch["x"] * params["fusion_encoder"]["slope"] + params["text_decoder"]["offset"]
    total = (batch["weight"] * jnp.square(prediction - batch["y"])).sum() + jax.lax.stop_gradient(
      batch["trouble"].sum()
    )
    metrics = {
      "noise": (jax.random.uniform(rng), jnp.float32(1.0)),
      "rows": (jnp.float32(len(batch["x"])), jnp.float32(1.0)),
    }
    return {"fit": total}, metrics, state.extra + 1

  def project(self, params):
    return params


def test_parameters_are_projected_after_the_update_and_before_they_are_averaged():
  class Clamped(Regression):
    def project(self, params):
      return jax.tree.map(lambda x: jnp.clip(x, 0.4, 0.45), params)

  optimizer = optax.sgd(0.01)
  step = step_lib.make_train_step(Clamped(), optimizer, ema_decay=0.5)
  state, _, _ = step(_regression_state(optimizer, ema=True), _regression_batch(), True)
  assert state.params["text_decoder"]["offset"] == np.float32(0.4)  # from -1
  assert state.ema_params["text_decoder"]["offset"] == pytest.approx((-1 + 0.4) / 2)


def _regression_state(optimizer, ema=False):
  params = {
    "fusion_encoder": {"slope": jnp.float32(0.5)},
    "text_decoder": {"offset": jnp.float32(-1.0)},
  }
  return TrainState(
    jnp.int32(0),
    params,
    optimizer.init(params),
    jax.tree.map(jnp.copy, params) if ema else (),
    jnp.int32(0),
    jax.random.key(7),
  )


def _regression_batch(step=0):
  draws = np.random.default_rng(step)
  weight = np.array([1, 2, 0, 0, 3, 1, 0, 2], np.float32)  # strided in 4 parts: 1+3, 2+1, 0+0, 0+2
  return {
    "x": draws.normal(size=8).astype(np.float32),
    "y": draws.normal(size=8).astype(np.float32),
    "weight": weight,
    "trouble": np.zeros(8, np.float32),
  }


def _by_hand(batch, parts):
  """Loss and gradients in float64: 2 x mean over `parts` of the weighted mean square of each."""
  slope, offset, total, d_slope, d_offset = 0.5, -1.0, 0.0, 0.0, 0.0
  for part in parts:
    x, y, w = (batch[k][part].astype(np.float64) for k in ("x", "y", "weight"))
    error, count = slope * x + offset - y, max(w.sum(), 1e-30)
    scale = 2.0 / len(parts) / count
    total += scale * (w * error**2).sum()
    d_slope += scale * (2 * w * error * x).sum()
    d_offset += scale * (2 * w * error).sum()
  return total, d_slope, d_offset


@pytest.mark.parametrize("accumulate", ["global", "mean_of_means"])
def test_division_of_accumulated_losses(accumulate):
  """The third part has no weight: it adds nothing, but counts as a part if means are averaged."""
  batch = _regression_batch()
  state = _regression_state(optax.sgd(0.1))
  whole = [slice(None)]
  strided = [slice(i, None, 4) for i in range(4)]
  one, (gradients, loss, metrics, extra) = (
    jax.jit(gradients_lib.make_gradients(Regression(), count, accumulate))(state, batch)
    for count in (1, 4)
  )
  expected = _by_hand(batch, whole if accumulate == "global" else strided)
  np.testing.assert_allclose(
    (loss, gradients["fusion_encoder"]["slope"], gradients["text_decoder"]["offset"]),
    expected,
    rtol=1e-5,
  )
  np.testing.assert_allclose(one[1], _by_hand(batch, whole)[0], rtol=1e-5)
  assert abs(_by_hand(batch, whole)[0] - _by_hand(batch, strided)[0]) > 0.1 * abs(
    _by_hand(batch, whole)[0]
  )
  # The metric is the plain weighted mean of the whole batch, without coefficient, either way.
  for shown in (one[2], metrics):
    np.testing.assert_allclose(
      shown["loss_fit"][0] / shown["loss_fit"][1], _by_hand(batch, whole)[0] / 2, rtol=1e-5
    )
  assert extra == 4
  assert one[3] == 1
  assert metrics["rows"] == (8.0, 4.0)


def test_keys_are_those_of_the_step_and_the_microbatch():
  state = _regression_state(optax.sgd(0.1)).replace(step=jnp.int32(11))
  for count in (1, 4):
    _, _, metrics, _ = gradients_lib.make_gradients(Regression(), count)(state, _regression_batch())
    step_key = jax.random.fold_in(state.rng, 11)
    expected = sum(jax.random.uniform(jax.random.fold_in(step_key, i)) for i in range(count))
    np.testing.assert_allclose(metrics["noise"][0], expected, rtol=1e-6)


def test_microbatches_take_rows_from_every_device():
  mesh = mesh_lib.make_mesh({"data": 4, "fsdp": 1, "tensor": 1}, jax.devices()[:4])
  rows = np.arange(16, dtype=np.int32)
  with jax.set_mesh(mesh):
    parts = jax.jit(lambda b: batches.split_rows(b, 2))(batches.put_batch({"row": rows}, mesh))[
      "row"
    ]
  assert parts.sharding.is_equivalent_to(
    jax.sharding.NamedSharding(mesh, P(None, ("data", "fsdp"))), 2
  )
  np.testing.assert_array_equal(parts, rows.reshape(8, 2).T)
  for shard in parts.addressable_shards:
    (device,) = np.flatnonzero(mesh.devices.ravel() == shard.device)
    assert set(np.ravel(shard.data)) == set(rows[4 * device : 4 * device + 4])


# ---- averages


@pytest.mark.parametrize(("include", "excluded"), [(".*", False), ("^(?!fusion_encoder)", True)])
def test_average_is_blended_after_every_update(include, excluded):
  optimizer = optax.sgd(0.05)
  step = jax.jit(
    step_lib.make_train_step(Regression(), optimizer, ema_decay=0.9, ema_include=include)
  )
  state, healthy = _regression_state(optimizer, ema=True), jnp.bool_(True)
  average = {"slope": 0.5, "offset": -1.0}
  for number in range(4):
    state, _, health = step(state, _regression_batch(number), healthy)
    average["offset"] = 0.9 * average["offset"] + 0.1 * float(
      state.params["text_decoder"]["offset"]
    )
    if not excluded:
      average["slope"] = 0.9 * average["slope"] + 0.1 * float(
        state.params["fusion_encoder"]["slope"]
      )
    assert int(state.step) == number + 1
    assert bool(health["ok"])
  np.testing.assert_allclose(
    state.ema_params["text_decoder"]["offset"], average["offset"], rtol=1e-6
  )
  np.testing.assert_allclose(
    state.ema_params["fusion_encoder"]["slope"], average["slope"], rtol=1e-6
  )
  assert (float(state.ema_params["fusion_encoder"]["slope"]) == 0.5) == excluded
  assert abs(float(state.params["fusion_encoder"]["slope"]) - 0.5) > 0.01


# ---- the guard


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("place", "leaf"), [("x", 0), ("y", 0), ("trouble", -1)])
def test_an_update_that_is_not_finite_is_not_applied_nor_any_after_it(value, place, leaf, name):
  """A bad x makes both gradients bad, slope first by name; a bad `trouble` the loss alone."""
  params = _regression_state(optax.sgd(0.1)).params
  optimizer, _ = optim.make(
    {"name": name, "lr": 0.1, "schedule": {"name": "constant"}}, params, 10, 10
  )
  step = jax.jit(step_lib.make_train_step(Regression(), optimizer, ema_decay=0.5))
  state, healthy = _regression_state(optimizer, ema=True), jnp.bool_(True)
  state, _, health = step(state, _regression_batch(0), healthy)
  good = tiny_run.flat(state)
  bad = _regression_batch(1)
  bad[place][0] = value
  state, metrics, health = step(state, bad, health["ok"])
  assert not bool(health["ok"])
  assert int(health["bad_leaf"]) == leaf
  assert not np.isfinite(float(metrics["loss"][0]))
  for name, x in tiny_run.flat(state).items():
    np.testing.assert_array_equal(x, good[name], err_msg=name)
  # The loop looks at `health` a step later; a good batch in between must not move the state, nor
  # clear the flag.
  state, _, health = step(state, _regression_batch(2), health["ok"])
  assert not bool(health["ok"])
  for name, x in tiny_run.flat(state).items():
    np.testing.assert_array_equal(x, good[name], err_msg=name)


def test_the_bad_leaf_is_named_as_the_parameters_are():
  params = _regression_state(optax.sgd(0.1)).params
  name = health_lib.bad_leaf_name
  assert name(params, {"bad_leaf": jnp.int32(1)}) == "the gradient of text_decoder/offset"
  assert name(params, {"bad_leaf": jnp.int32(-1)}) == "the loss"
