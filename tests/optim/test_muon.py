"""Muon against singular value decompositions and its formula in float64."""

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mplug_jax import optim
from mplug_jax.optim import muon
from mplug_jax.parallel import mesh as mesh_lib

CONFIG = {
  "name": "muon",
  "lr": 1e-2,
  "weight_decay": 0.1,
  "momentum": 0.9,
  "clip": 0.5,
  "schedule": {"name": "constant"},
}


def _params():
  rng = np.random.default_rng(0)
  shapes = {
    "a": {"kernel": (3, 8, 16), "bias": (3, 16)},
    "b": {"kernel": (16, 8)},
    "c": {"kernel": (8, 16)},
    "d": {"scale": (5,)},
  }
  return jax.tree.map(lambda s: rng.normal(size=s), shapes, is_leaf=lambda x: isinstance(x, tuple))


def _orthogonalized(x):
  """The same iteration on the singular values alone, in float64."""
  u, s, vt = np.linalg.svd(x / np.linalg.norm(x), full_matrices=False)
  for _ in range(muon.ITERATIONS):
    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
  return (u * s) @ vt


def _updater(tx):
  """Jitted function (gradients, state, parameters) -> (parameters, state)."""

  @jax.jit
  def update(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return update


def test_singular_values_become_about_one():
  x = np.random.default_rng(0).normal(size=(4, 24, 40)) * np.geomspace(1, 30, 40)
  for wide in (x, x.swapaxes(1, 2)):
    ours = np.asarray(jax.jit(muon.orthogonalize)(wide.astype(np.float32)))
    for i in range(len(x)):
      np.testing.assert_allclose(ours[i], _orthogonalized(wide[i]), atol=2e-4)
      values = np.linalg.svd(ours[i], compute_uv=False)
      assert values.min() > 0.65
      assert values.max() < 1.25


def test_updates_follow_the_formula():
  """Matrices of equal shape, in stacks or alone, move as if each were by itself.

  The rest is AdamW's.
  """
  params = jax.tree.map(np.float32, _params())
  tx, schedules = optim.make(
    {**CONFIG, "groups": [[".*/kernel", {"group": "matrices", "lr": 0.02}], [".*", {}]]},
    params,
    10,
    5,
  )
  assert set(schedules) == {"matrices", "main"}
  update, (state, got) = _updater(tx), (jax.jit(tx.init)(params), params)
  wanted, mean = _params(), jax.tree.map(np.zeros_like, _params())
  adamw = optax.adamw(1e-2, weight_decay=0.1)
  others = {"a": params["a"]["bias"], "d": params["d"]["scale"]}
  update_others, other_state = _updater(adamw), jax.jit(adamw.init)(others)
  for t in range(3):
    grads = jax.tree.map(lambda x: x * 0.1 + t * 0.05, _params())  # noqa: B023
    got, state = update(jax.tree.map(np.float32, grads), state, got)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * min(1.0, 0.5 / (norm + 1e-6)), grads)  # noqa: B023
    for name in "abc":
      g = grads[name]["kernel"]
      mean[name]["kernel"] = 0.9 * mean[name]["kernel"] + 0.1 * g
      ahead = (0.9 * mean[name]["kernel"] + 0.1 * g).reshape((-1,) + g.shape[-2:])
      direction = 0.2 * np.sqrt(16) * np.stack([_orthogonalized(x) for x in ahead]).reshape(g.shape)
      wanted[name]["kernel"] -= 0.02 * (direction + 0.1 * wanted[name]["kernel"])
    rest = {"a": grads["a"]["bias"], "d": grads["d"]["scale"]}
    others, other_state = update_others(jax.tree.map(np.float32, rest), other_state, others)
  for name in "abc":
    np.testing.assert_allclose(got[name]["kernel"], wanted[name]["kernel"], atol=2e-4)
  np.testing.assert_allclose(got["a"]["bias"], others["a"], atol=2e-6)
  np.testing.assert_allclose(got["d"]["scale"], others["d"], atol=2e-6)


def test_bad_gradients_change_nothing():
  params = jax.tree.map(np.float32, _params())
  tx, _ = optim.make(CONFIG, params, 10, 5)
  update = jax.jit(lambda grads, state, params, ok: tx.update(grads, state, params, ok=ok))
  _, state = update(params, jax.jit(tx.init)(params), params, True)
  bad = jax.tree.map(np.copy, params)
  for x in jax.tree.leaves(bad):
    x[0] = np.nan
  updates, after = update(bad, state, params, False)
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(updates))
  jax.tree.map(np.testing.assert_array_equal, after, state)


def test_updates_on_a_mesh_are_those_of_one_device():
  params = jax.tree.map(np.float32, _params())
  tx, _ = optim.make(CONFIG, params, 10, 5)
  update = jax.jit(lambda params: tx.update(params, tx.init(params), params)[0])
  alone = update(params)
  mesh = mesh_lib.make_mesh(ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
  specs = jax.tree.map(
    lambda x: (
      P(*[None] * (x.ndim - 2), "fsdp", "tensor") if x.ndim > 1 and x.shape[-2] % 2 == 0 else P()
    ),
    params,
  )
  split = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs)
  shared = update(split)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), shared, alone)
