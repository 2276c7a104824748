"""Attention, dense layers, layer norm and stacks of layers against plain arithmetic."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.models import layers
from mplug_jax.ops import activations, attention, dropout
from mplug_jax.parallel import mesh
from tests.support import random_state

# ---- attention


def heads_of(x):
  """Channels of three heads -> [B, 3, L, 8]."""
  return x.reshape(*x.shape[:2], 3, 8).swapaxes(1, 2)


def reference_attention(q, k, v, allowed=None, keep=None):
  """Plain softmax attention in float64; `keep` multiplies the probabilities."""
  q, k, v = map(heads_of, (q, k, v))
  scores = np.einsum("bhld,bhsd->bhls", q, k).astype(np.float64) / np.sqrt(q.shape[-1])
  if allowed is not None:
    scores = np.where(allowed, scores, -1e9)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  out = np.einsum("bhls,bhsd->bhld", p if keep is None else p * keep, v)
  return out.swapaxes(1, 2).reshape(2, 5, 24)


@pytest.fixture(scope="module")
def qkv():
  rng = np.random.default_rng(0)
  return [rng.normal(size=(2, length, 24)).astype(np.float32) * 2 for length in (5, 7, 7)]


def options_of(kind):
  """Returns (options of attention, which keys a query attends to or None)."""
  if kind == "none":
    return {}, None
  mask = np.random.default_rng(1).random((2, 7)) < 0.6
  mask[:, 0] = kind != "empty row"
  options = {"heads": 3, "mask": mask, "causal": kind != "keys"}
  earlier = np.tril(np.ones((5, 7), bool)) if options["causal"] else True
  return options, mask[:, None, None] & earlier


@pytest.mark.parametrize("kind", ["none", "keys", "causal", "empty row"])
def test_attention_equals_plain_softmax(qkv, kind):
  options, allowed = options_of(kind)
  out = np.asarray(jax.jit(lambda *x: attention.attention(*x, **{"heads": 3, **options}))(*qkv))
  np.testing.assert_allclose(out, reference_attention(*qkv, allowed), atol=3e-6)
  if kind == "empty row":
    np.testing.assert_allclose(out[1, 0], qkv[2][1].mean(0), atol=1e-6)


def test_attention_gradient_equals_autodiff_of_softmax(qkv):
  options, allowed = options_of("empty row")
  weights = np.random.default_rng(2).normal(size=(2, 3, 5, 8)).astype(np.float32)

  def plain(q, k, v):
    q, k, v = map(heads_of, (q, k, v))
    scores = jnp.where(allowed, jnp.einsum("bhld,bhsd->bhls", q, k) / np.sqrt(8), -1e9)
    return (jnp.einsum("bhls,bhsd->bhld", jax.nn.softmax(scores), v) * weights).sum()

  def ours(*x):
    return (heads_of(attention.attention(*x, **options)) * weights).sum()

  gradients = jax.jit(jax.grad(ours, (0, 1, 2)))(*qkv)
  for a, b in zip(gradients, jax.jit(jax.grad(plain, (0, 1, 2)))(*qkv)):
    np.testing.assert_allclose(a, b, atol=2e-5)
  assert np.isfinite(gradients[0]).all()
  assert not np.any(gradients[0][:, 0])  # the first key is masked, the others are later


def test_attention_dropout_is_dropout_of_the_probabilities(qkv):
  options, allowed = options_of("keys")
  key = jax.random.key(4)
  keep = np.asarray(dropout.keep_mask(key, (2, 3, 5, 7), 0.3)) / 0.7

  def dropped(key, *x):
    return attention.attention(*x, **options, rate=0.3, rng=key)

  out = jax.jit(dropped)(key, *qkv)
  np.testing.assert_allclose(out, reference_attention(*qkv, allowed, keep), atol=3e-6)
  keys = jax.random.split(key, 4096)
  mean = jax.jit(lambda *x: jax.vmap(lambda k: dropped(k, *x))(keys).mean(0))(*qkv)
  np.testing.assert_allclose(mean, reference_attention(*qkv, allowed), atol=0.1)


def test_attention_scores_are_float32_whatever_the_inputs():
  """Scores near 300 with differences of 0.5 are lost in bfloat16, whose spacing there is 2."""
  bfloat16 = jnp.dtype(jnp.bfloat16)
  q, k = np.full((1, 1, 64), 8.0, bfloat16), np.full((1, 2, 64), 4.6875, bfloat16)
  k[0, 1, 0] += 0.5
  v = np.repeat(np.asarray([0.0, 1.0], bfloat16), 64).reshape(1, 2, 64)
  out = jax.jit(lambda *x: attention.attention(*x, heads=1))(q, k, v)
  assert out.dtype == jnp.bfloat16
  assert abs(float(out[0, 0, 0]) - 1 / (1 + np.exp(-0.5))) < 0.005


def test_rows_that_share_keys_equal_repeated_keys():
  """M = 2 rows of keys, R = 3 rows of queries each."""
  rng = np.random.default_rng(3)
  x, memory = (
    rng.normal(size=(6, 4, 16)).astype(np.float32),
    rng.normal(size=(2, 5, 12)).astype(np.float32),
  )
  mask = rng.random((2, 5)) < 0.7
  module = layers.Attention(width=16, heads=2)

  def attend(m, x, memory, mask):
    return m.attend(x, *m.keys_values(memory), mask)

  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, memory, mask, method=attend))
  params = random_state.params(shapes, 0.3)

  @jax.jit
  def both(params):
    repeated = jnp.repeat(memory, 3, 0), jnp.repeat(mask, 3, 0)
    return [module.apply(params, x, *keys, method=attend) for keys in ((memory, mask), repeated)]

  folded, expected = both(params)
  np.testing.assert_allclose(folded, expected, atol=1e-6)


@pytest.mark.parametrize(
  ("platform", "depth", "policy", "unrolled"),
  [
    ("cpu", 4, "none", 4),
    ("cpu", 12, "none", 1),
    ("tpu", 12, "none", 12),
    ("gpu", 12, "none", 12),
    ("tpu", 12, "full", 1),
  ],
)
def test_stacks_are_unrolled_where_a_loop_would_copy_activations(
  monkeypatch, platform, depth, policy, unrolled
):
  assert mesh.target()[0] == "cpu"
  monkeypatch.setattr(mesh, "target", lambda: (platform, "some kind"))
  assert layers._unroll(depth, policy) == unrolled


@pytest.mark.parametrize(
  ("rows", "devices", "expected"),
  [
    (16, 1, [8, 8]),
    (16, 4, [16]),  # 4 rows on each device fit
    (128, 4, [32] * 4),
    (6, 1, [6]),
    (9, 1, [3] * 3),  # parts of the same size
    (1024, 1, [1024]),  # too many parts
  ],
)
def test_rows_are_computed_by_parts_that_stay_on_the_chip(monkeypatch, rows, devices, expected):
  monkeypatch.setattr(mesh, "target", lambda: ("tpu", "some kind"))
  monkeypatch.setattr(layers, "_ON_CHIP", 8 * 1000)
  sizes = []

  def double(x):
    sizes.append(x.shape[0])
    return 2 * x

  sizes_of_mesh = {"data": devices, "fsdp": 1, "tensor": 1}
  x = jnp.arange(rows * 6.0).reshape(rows, 3, 2)
  with jax.set_mesh(mesh.make_mesh(sizes_of_mesh, jax.devices()[:devices])):
    out = jax.jit(lambda x: layers.by_parts(double, x, 1000))(x)
  np.testing.assert_array_equal(out, 2 * x)
  assert sizes == expected


# ---- linear layers


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 4, 5)])
def test_dense_and_its_gradient_rule_equal_flax(shape, use_bias):
  rng = np.random.default_rng(0)
  x, weights = (
    rng.normal(size=shape).astype(np.float32),
    rng.normal(size=(*shape[:-1], 7)).astype(np.float32),
  )
  modules = layers.Dense(features=7, use_bias=use_bias), nn.Dense(7, use_bias)
  shapes = [jax.eval_shape(lambda m=m: m.init(jax.random.key(0), x)) for m in modules]
  assert shapes[0] == shapes[1]
  params = jax.tree.map(lambda p: p + np.float32(0.5), random_state.params(shapes[0], 0.5))

  def value_and_gradients(module, params):
    def loss(params, x):
      return (jnp.sin(module.apply(params, x)) * weights).sum()

    return jax.value_and_grad(loss, (0, 1))(params, x)

  ours, expected = jax.jit(lambda p: [value_and_gradients(m, p) for m in modules])(params)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_dense_in_bfloat16_keeps_float32_parameters():
  x = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
  shapes = jax.eval_shape(lambda: layers.Dense(features=16).init(jax.random.key(0), x))
  params = random_state.params(shapes, 0.2)

  def loss(params, dtype):
    out = layers.Dense(features=16, dtype=dtype).apply(params, x)
    return jnp.square(out).sum(), out

  @jax.jit
  def both(params):
    gradient = jax.value_and_grad(loss, has_aux=True)
    return gradient(params, jnp.float32), gradient(params, jnp.bfloat16)

  ((plain, _), expected), ((low, out), gradient) = both(params)
  assert out.dtype == jnp.bfloat16
  assert abs(low - plain) < 0.02 * plain
  for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected)):
    assert a.dtype == jnp.float32
    assert np.abs(a - b).max() < 0.03 * np.abs(b).max()


# ---- layer norm


@functools.partial(jax.jit, static_argnums=0)
def normalized(epsilon, params, x):
  """Layer norm in float32 and in bfloat16."""
  return [
    layers.LayerNorm(epsilon=epsilon, dtype=dtype).apply(params, x)
    for dtype in (jnp.float32, jnp.bfloat16)
  ]


@pytest.mark.parametrize("epsilon", [1e-5, 1e-12])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-4, 0.0), (1.0, 1000.0)])
def test_layer_norm_in_float32_with_its_epsilon(epsilon, scale, offset):
  """Small inputs show the epsilon.

  A large offset shows a variance taken as a difference of squares.
  """
  rng = np.random.default_rng(0)
  x = (rng.normal(size=(4, 64)) * scale + offset).astype(np.float32)
  params = {
    "params": {
      "scale": rng.normal(size=64).astype(np.float32),
      "bias": rng.normal(size=64).astype(np.float32),
    }
  }
  wide = x.astype(np.float64)
  expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + epsilon)
  expected = expected * params["params"]["scale"] + params["params"]["bias"]
  out, low = normalized(epsilon, params, x)
  np.testing.assert_allclose(out, expected, atol=1e-5 if not offset else 5e-4)
  assert low.dtype == jnp.bfloat16
  np.testing.assert_allclose(low, out, rtol=0.01, atol=0.01)


def test_activations():
  x = np.linspace(-6, 6, 101)
  erf = np.vectorize(math.erf)
  np.testing.assert_allclose(
    activations.gelu(x.astype(np.float32)), x * 0.5 * (1 + erf(x / np.sqrt(2))), atol=2e-6
  )
  np.testing.assert_allclose(
    activations.quick_gelu(x.astype(np.float32)), x / (1 + np.exp(-1.702 * x)), atol=2e-6
  )


class Wide(nn.Module):
  """A layer that would keep 64 times its input for the backward pass."""

  @nn.compact
  def __call__(self, x):
    return x + nn.Dense(8)(jnp.sin(nn.Dense(512)(x))), None


@pytest.mark.parametrize("depth", [4, 6])
def test_remat_saves_memory(depth):
  """Stacks that would be unrolled included, where the compiler could merge equal values."""
  assert 4 <= layers.UNROLLED_DEPTH < 6
  x = jnp.ones((256, 8))
  needed = {}
  for policy in ("none", "full"):
    stack = layers.scan(Wide, depth, policy)()
    params = jax.eval_shape(stack.init, jax.random.key(0), x)
    compiled = (
      jax.jit(jax.grad(lambda p, s=stack: jnp.square(s.apply(p, x)[0]).sum()))
      .lower(params)
      .compile()
    )
    needed[policy] = compiled.memory_analysis().temp_size_in_bytes
  assert needed["full"] < 0.7 * needed["none"], needed


def test_remat_policy_dots_keeps_the_outputs_of_products():
  """Counts the products of a layer with three dense parts, forward, backward and recomputed.

  Every policy repeats the dropout masks: the gradients are equal.
  """

  class Products(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = layers.Dropout(rate=0.5)(layers.Dense(features=16, name="a")(x))
      x = layers.ActivationThenDense(features=16, activation=activations.gelu, name="b")(
        layers.LayerNorm(epsilon=1e-6)(x)
      )
      return layers.ActivationThenDense(features=16, activation=activations.gelu, name="c")(x)

  x = np.ones((4, 16), np.float32) * np.arange(16, dtype=np.float32)
  shapes = jax.eval_shape(lambda: Products().init(jax.random.key(0), x))
  params, counts, gradients = random_state.params(shapes, 0.25), {}, {}
  for policy in ("none", "dots", "full"):
    layer = layers.remat(Products, policy)()

    def loss(params, layer=layer):
      return jnp.sin(layer.apply(params, x, rngs={"dropout": jax.random.key(0)})).sum()

    traced = jax.jit(jax.grad(loss)).trace(params)
    counts[policy] = str(traced.jaxpr).count("dot_general[")
    gradients[policy] = jax.device_get(traced.lower().compile()(params))
  assert counts["none"] == counts["dots"]
  assert counts["full"] == counts["none"] + 2
  for policy in ("dots", "full"):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
      gradients[policy],
      gradients["none"],
    )


def test_remat_outside_a_loop_has_a_barrier():
  layer = layers.remat(Wide, "full")()
  params = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((4, 8)))
  lowered = jax.jit(jax.grad(lambda p: layer.apply(p, jnp.ones((4, 8)))[0].sum())).lower(params)
  assert "optimization_barrier" in lowered.as_text()


def test_unknown_remat_policy_lists_the_known():
  with pytest.raises(ValueError, match="'some' is not one of none, full, dots"):
    layers.remat(Wide, "some")
