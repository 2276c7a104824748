"""Gradients and numerics of the model, shapes that do not fit, heads."""

import functools
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.models.mplug import MPlug
from tests.support.models_case import GEOMETRY, PAD, Case, apply, fused, random_params

# ---- gradients and numerics


def test_pad_embedding_gets_gradient_from_the_tied_head_only():
  def loss(params, question, ids):
    text = model.apply(
      {"params": params}, question, jnp.ones(question.shape, bool), method=MPlug.encode_text
    )  # pads are read
    logits = model.apply(
      {"params": params}, ids, ids != PAD, model.memory(text), method=MPlug.decode
    )
    return jnp.square(text).sum() + jnp.square(logits).sum()

  def both(m, question, ids):
    m.decode(ids, ids != PAD, m.memory(m.encode_text(question, question != PAD)))

  model = MPlug(**GEOMETRY | dict(text_layers=1, decoder_layers=1))
  question, ids = np.asarray([[4, 5, PAD, PAD]], np.int32), np.asarray([[7, 8, PAD]], np.int32)
  gradient = jax.jit(jax.grad(loss))(random_params(model, both, question, ids), question, ids)
  encoder, decoder = (
    np.asarray(gradient[part]["embeddings"]["word"]["embedding"])
    for part in ("text_encoder", "text_decoder")
  )
  assert np.flatnonzero(encoder.any(1)).tolist() == [4, 5]
  assert decoder.any(1).all()  # every word, the pad too, is an output


def understand(m, image, question):
  """Returns the fused text of image tokens [B, N, D] and text [B, L]."""
  mask = question != PAD
  return m.fuse(m.encode_text(question, mask), mask, image)[1]


def test_dropout_needs_a_key_and_remat_repeats_its_masks(inputs):
  geometry = GEOMETRY | dict(text_layers=1, fusion_layers=1)
  args = np.random.default_rng(0).normal(size=(2, 4, 16)).astype(np.float32), inputs[1][:, 0]
  params = random_params(MPlug(**geometry), understand, *args)

  def forward(params, key=None, **changes):
    rngs = None if key is None else {"dropout": key}
    return MPlug(**geometry | changes).apply(
      {"params": params}, *args, method=understand, rngs=rngs
    )

  keys = [jax.random.key(k) for k in (8, 9)]
  results, recomputed = {}, {}
  for policy in ("none", "full", "dots"):

    def loss(params, key, policy=policy):
      out = forward(params, key, remat=policy)
      return jnp.sin(out).sum(), out

    traced = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(params, keys[0])
    recomputed[policy] = len(
      re.findall("checkpoint|remat", str(traced.jaxpr))
    )  # attention's own are in all three
    assert (recomputed[policy] > recomputed["none"]) == (policy != "none")
    if policy != "dots":  # test_layers compares its gradients with dropout
      results[policy] = jax.device_get(traced.lower().compile()(params, keys[0]))
  (plain, both), gradient = results["none"]
  (value, _), other = results["full"]
  assert abs(value - plain) < 1e-5
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max())),
    other,
    gradient,
  )

  # Without a key the program is that without dropout.
  off = functools.partial(forward, dropout_rate=0.0, attention_dropout_rate=0.0)
  assert str(jax.make_jaxpr(forward)(params)) == str(jax.make_jaxpr(off)(params))
  # Dropout of activations acts alone; with it, dropout of probabilities changes the result.
  activations = jax.jit(functools.partial(forward, attention_dropout_rate=0.0))
  alone = [np.asarray(activations(params, key)) for key in keys]
  assert np.abs(alone[0] - alone[1]).max() > 0.1
  assert np.abs(alone[0] - both).max() > 0.1


def test_bfloat16_is_close_to_float32(asymmetric, inputs):
  low = Case(inputs, stride=2, dtype=jnp.bfloat16)
  plain, rounded = asymmetric.answer(*inputs), low.outputs(asymmetric.params, *inputs)
  assert rounded[0].dtype == jnp.float32
  assert rounded[1].dtype == jnp.bfloat16  # tokens of the image
  error = np.abs(rounded[0] - plain)
  assert 0 < error.max() < 0.1 * np.abs(plain).max()
  assert error.mean() < 0.01 * np.abs(plain).max()
  assert {x.dtype for x in jax.tree.leaves(low.shapes)} == {jnp.dtype("float32")}


# ---- shapes that do not fit


def test_images_and_texts_of_the_wrong_size_raise(connected, inputs):
  image = inputs[0]
  with pytest.raises(
    ValueError, match=r"\(16, 16, 3\) and got \(24, 24, 3\); set config.model.image_size"
  ):
    connected.model.apply(
      {"params": connected.params}, np.zeros((1, 24, 24, 3)), method=MPlug.encode_image
    )
  larger = MPlug(**GEOMETRY | dict(image_size=32))
  with pytest.raises(flax.errors.ScopeParamShapeError, match="position_embedding"):
    larger.apply({"params": connected.params}, np.zeros((1, 32, 32, 3)), method=MPlug.encode_image)
  with pytest.raises(ValueError, match="image_size=20 is not a multiple of the patch size 8"):
    MPlug(**GEOMETRY | dict(image_size=20)).init(
      jax.random.key(0), np.zeros((1, 20, 20, 3)), method=MPlug.encode_image
    )
  tokens = np.zeros((2, 5, 16), np.float32)
  for method, *args in (
    (fused, image, np.full((2, 13), 5)),
    (lambda m, x, ids: m.decode(ids, ids != PAD, m.memory(x)), tokens, np.full((2, 13), 5)),
    (lambda m, x: m.init_cache(m.memory(x), 1, 13), tokens),
  ):
    with pytest.raises(
      ValueError, match="Texts of 13 tokens do not fit config.model.max_positions=12"
    ):
      jax.eval_shape(apply(connected.model, method), connected.params, *args)


# ---- heads and parameters


def heads(m, image, text):
  return (
    *m.contrastive_features(image, text),
    m.match_logits(text),
    m.mlm_logits(text),
    m.class_logits(text[:, 0]),
  )


def test_shapes_and_dtypes_of_heads():
  model, tokens = (
    MPlug(**GEOMETRY, classes=3),
    np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32),
  )
  params = random_params(model, heads, tokens, tokens)
  assert set(params) == {"vision_proj", "text_proj", "itm_head", "cls_head", "fusion_encoder"}
  assert list(params["fusion_encoder"]) == ["mlm_head"]
  run = apply(model, heads)
  out = run(params, tokens, tokens)
  assert [x.shape for x in out] == [(2, 8), (2, 8), (2, 2), (2, 5, 23), (2, 3)]
  assert {x.dtype.name for x in out} == {"float32"}
  for x in out[:2]:
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1.0, atol=1e-6)
  assert all(
    np.isfinite(x).all() for x in run(jax.tree.map(jnp.zeros_like, params), tokens, tokens)
  )
  assert model.bind({"params": params}).contrastive_features(tokens, None)[1] is None
  temperature = model.init(jax.random.key(0), method=MPlug.contrastive_temperature)["params"]
  assert abs(float(temperature.pop("temp")["value"]) - 0.07) < 1e-7
  assert not temperature


def test_parameters_exist_only_for_used_modules(connected, inputs):
  assert set(connected.params) == {
    "visual_encoder",
    "visn_fc",
    "visn_layer_norm",
    "text_encoder",
    "fusion_encoder",
    "text_decoder",
  }
  assert set(connected.params["fusion_encoder"]) == {"layer_0", "layer_1"}

  def caption(m, image, ids):
    return m.decode(ids, ids != PAD, m.memory(m.encode_image(image)))

  same_width = MPlug(**GEOMETRY | dict(vision_width=16))
  params = jax.eval_shape(
    lambda: same_width.init(jax.random.key(0), inputs[0], inputs[1][:, 0], method=caption)
  )["params"]
  assert set(params) == {"visual_encoder", "text_decoder"}
