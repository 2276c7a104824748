"""Every array operation against its reference: values and gradients; config.model.ops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.models.mplug import MPlug
from mplug_jax.ops import activations, attention, dropout, initializers, layer_norm, linear, table
from mplug_jax.ops.attention import reference
from tests.support import random_state


def normal(*shape):
  return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def check_equal(function, expected, *arrays):
  """Compares values, and gradients of a weighted sum with respect to every array."""

  def value_and_gradients(function):
    def loss(*arrays):
      out = function(*arrays)
      return (jnp.sin(jnp.arange(out.size).reshape(out.shape)) * out).sum(), out

    return jax.jit(jax.grad(loss, tuple(range(len(arrays))), has_aux=True))(*arrays)

  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
    value_and_gradients(function),
    value_and_gradients(expected),
  )


@pytest.mark.parametrize("activation", [activations.gelu, activations.quick_gelu])
def test_derivative_of_an_activation(activation):
  x = normal(50) * 3
  np.testing.assert_allclose(
    jax.jit(activation.derivative)(x),
    jax.jit(jax.vmap(jax.grad(activation)))(x),
    rtol=1e-4,
    atol=1e-5,
  )


@pytest.mark.parametrize("activation", [None, activations.gelu])
def test_linear_equals_its_reference(activation):
  check_equal(
    lambda *arrays: linear.linear(activation, *arrays),
    lambda *arrays: linear.linear_reference(activation, *arrays),
    *(normal(2, 3, 4), normal(4, 5), normal(5)),
  )


def test_layer_norm_equals_its_reference():
  check_equal(
    lambda *arrays: layer_norm.normalize(*arrays, 1e-5),
    lambda *arrays: layer_norm.normalize_reference(*arrays, 1e-5),
    *(normal(2, 3, 8), normal(8), normal(8)),
  )


@pytest.mark.parametrize("has_mask", [False, True])
def test_attention_equals_its_reference(has_mask):
  options = {"mask": normal(2, 7) < 0.5, "causal": True} if has_mask else {}
  check_equal(
    lambda *arrays: attention.attention(*arrays, 3, **options),
    lambda *arrays: reference.attention_reference(*arrays, 3, **options),
    *(normal(2, 5, 24), normal(2, 7, 24), normal(2, 7, 24)),
  )


@pytest.mark.parametrize("function", [dropout.dropout, dropout.dropout_reference])
def test_both_dropouts_zero_a_share_and_scale_the_others(function):
  x = normal(100, 200)
  out = np.asarray(function(x, 0.2, jax.random.key(0)))
  kept = out != 0
  assert abs(kept.mean() - 0.8) < 5 * np.sqrt(0.16 / x.size)
  np.testing.assert_allclose(out[kept], x[kept] / 0.8, rtol=1e-6)
  assert function(x, 0.2, None) is x
  assert function(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize("function", [initializers.normal, initializers.normal_reference])
def test_both_initializers_have_the_standard_deviation(function):
  x = np.asarray(function(0.02)(jax.random.key(0), (200, 300), jnp.float32))
  assert abs(x.std() / 0.02 - 1) < 5 / np.sqrt(2 * x.size)
  assert abs(x.mean()) < 5 * 0.02 / np.sqrt(x.size)


def test_unknown_operations_raise():
  with pytest.raises(ValueError, match="config.model.ops='fast' is not one of auto, reference"):
    table.get("fast")


def forward(module, image, ids):
  mask = ids != 0
  image, text = module.fuse(module.encode_text(ids, mask), mask, module.encode_image(image))
  losses, _ = module.decode_losses(ids, mask, module.memory(image, text, mask), ids)
  return losses.sum() + module.class_logits(text[:, 0]).sum()


def test_model_with_reference_operations_has_no_rule_of_its_own():
  """Same parameters, value and gradients; no custom gradient rule but those of JAX itself."""
  sizes = dict(vision_width=64, vision_layers=1, hidden_size=32, mlp_dim=64, vocab_size=20)
  layers = dict(text_layers=1, fusion_layers=2, stride=1, decoder_layers=1)
  other = dict(image_size=16, patch_size=8, heads=2, max_positions=8, pad_id=0)
  image = normal(2, 16, 16, 3)
  ids = np.array([[1, 2, 3, 0], [4, 5, 0, 0]])
  results, shapes, params = {}, {}, None
  for name in ("auto", "reference"):
    model = MPlug(**sizes, **layers, **other, ops=name)
    shapes[name] = jax.eval_shape(
      lambda m=model: m.init(jax.random.key(0), image, ids, method=forward)["params"]
    )
    params = random_state.params(shapes[name], 0.3) if params is None else params

    def loss(params, m=model):
      return m.apply({"params": params}, image, ids, method=forward)

    program = jax.make_jaxpr(loss)(params)
    rules = str(program).count("custom_vjp_call")
    assert (rules == 0) == (name == "reference")

    def value(params, program=program):  # without tracing the model again
      return jax.core.eval_jaxpr(program.jaxpr, program.consts, *jax.tree.leaves(params))[0]

    results[name] = jax.jit(jax.value_and_grad(value))(params)
  assert shapes["auto"] == shapes["reference"]
  for x, y in zip(*map(jax.tree.leaves, results.values()), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * max(1, np.abs(y).max()))
