"""The model: shared images, fusion rules, incremental decoding, gradients and sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.models import bert, fusion
from mplug_jax.models.mplug import MPlug, decoding_fns
from tests.support.models_case import GEOMETRY, PAD, apply, fused, random_params, shapes


@pytest.fixture(scope="module", params=["connected", "asymmetric"])
def case(request):
  return request.getfixturevalue(request.param)


# ---- rows


def test_questions_about_an_image_equal_separate_calls_with_longer_padding(case, inputs):
  """Neither the other questions nor padding changes a logit of a real token."""
  image, question, answers = inputs
  together = case.answer(*inputs)
  wide = [
    np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 3)], constant_values=PAD) for x in (question, answers)
  ]
  real = answers != PAD
  for q in range(3):
    alone = case.answer(image, *(x[:, [q]] for x in wide))[..., :5, :]
    np.testing.assert_allclose(together[:, [q]][real[:, [q]]], alone[real[:, [q]]], atol=2e-5)
  # The image matters.
  assert np.abs(together - case.answer(image[::-1], question, answers)).max() > 0.1


def test_memory_repeats_the_segment_with_fewer_rows():
  image = np.arange(2.0)[:, None, None] * np.ones((1, 4, 3))
  text = np.ones((6, 5, 3))
  mask = np.random.default_rng(0).random((6, 5)) < 0.5
  mixed = bert.Memory((image, text), (None, mask))
  assert mixed.rows == 6
  np.testing.assert_array_equal(mixed.repeat(image)[:, 0, 0], [0, 0, 0, 1, 1, 1])
  assert mixed.repeat(text) is text
  np.testing.assert_array_equal(mixed.mask, np.concatenate([np.ones((6, 4), bool), mask], 1))
  assert bert.Memory((image,), (None,)).mask is None


# ---- fusion


@pytest.mark.parametrize(
  ("stride", "released", "paper"),
  [(1, (1, 2, 3, 4, 5), (1, 3, 5)), (2, (2, 4), (2, 5)), (3, (3,), (3,)), (6, (), ())],
)
def test_connected_layers_of_a_stack_of_six(stride, released, paper):
  assert fusion.connected_layers(6, stride, "released") == released
  assert fusion.connected_layers(6, stride, "paper") == paper
  with pytest.raises(ValueError, match="'other' is not one of released, paper"):
    fusion.connected_layers(6, stride, "other")


def test_rules_differ_by_the_residual_sum_of_the_image(connected, inputs):
  """Two layers, stride 1: layer 1 is connected under both rules, with the same parameters."""
  paper = apply(MPlug(**GEOMETRY, fusion="paper"), fused)
  _, before, *released = jax.device_get(connected.outputs(connected.params, *inputs))
  other = jax.device_get(paper(connected.params, inputs[0], inputs[1].reshape(-1, 5)))
  np.testing.assert_allclose(released[1], other[1], atol=1e-6)
  assert released[0].shape == other[0].shape == (6, 5, 16)
  np.testing.assert_allclose(released[0] - other[0], np.repeat(before, 3, 0), atol=1e-5)


def test_without_a_connected_layer_the_image_is_unchanged(asymmetric, inputs):
  _, before, image, text = asymmetric.outputs(asymmetric.params, *inputs)
  np.testing.assert_array_equal(image, before)
  assert image.shape == (2, 5, 16)
  assert text.shape == (6, 5, 16)


def test_connected_layers_have_no_cross_attention(inputs):
  for rule, connected in (("released", {1, 2}), ("paper", {1})):
    model = MPlug(**GEOMETRY | dict(fusion=rule, fusion_layers=3))
    stack = shapes(model, fused, inputs[0], inputs[1][:, 0])["fusion_encoder"]
    assert {j for j in range(3) if "crossattention" not in stack[f"layer_{j}"]} == connected


def pair(m, text, mask, first, second):
  return m.fusion_encoder.pair(text, mask, first, second)


@pytest.mark.parametrize("kind", ["crossattention", "connected"])
def test_every_duplicated_layer_reads_its_own_image(kind):
  """The text depends on both images in a layer with cross-attention, and in a connected layer."""
  layers = 1 if kind == "crossattention" else 2
  model = MPlug(**GEOMETRY | dict(fusion_layers=layers), pairing="duplicated")
  draws = np.random.default_rng(2)
  text, first, second = (draws.normal(size=(2, n, 16)).astype(np.float32) for n in (4, 5, 5))
  arguments = (text, np.ones((2, 4), bool), first, second)
  params = random_params(model, pair, *arguments)
  if kind == "connected":  # the first layer and its copy read no image
    for name in ("layer_0", "second_0"):
      output = params["fusion_encoder"][name]["crossattention"]["out"]
      output["kernel"] = np.zeros_like(output["kernel"])

  def loss(first, second):
    out = model.apply({"params": params}, text, arguments[1], first, second, method=pair)
    return (jnp.sin(out) * text).sum()

  for gradient in jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 1)))(first, second)):
    assert np.abs(gradient).max() > 1e-3


# ---- decoding


def test_incremental_decoding_equals_teacher_forcing(case, inputs):
  """3 beams per memory row, which change places after position 1."""
  image, question, _ = inputs
  rng = np.random.default_rng(5)
  before, after = rng.integers(4, 23, (6, 3, 2)), rng.integers(4, 23, (6, 3, 3))
  parents = rng.integers(0, 3, (6, 3)).astype(np.int32)
  _, _, *tokens = case.outputs(case.params, *inputs)
  start = apply(case.model, lambda m, *memory: m.init_cache(m.memory(*memory), 3, 5))
  cache = start(case.params, *tokens, question.reshape(-1, 5) != PAD)
  assert cache["cross"][0]["key"].shape[0] == 6  # keys of the memory: never a copy per beam

  @jax.jit
  def step(params, cache, tokens, position):
    return decoding_fns(case.model, params)[0](cache, tokens, position)

  logits = []
  for t in range(5):
    tokens = np.asarray(before[..., t] if t < 2 else after[..., t - 2], np.int32)
    out, cache = step(case.params, cache, tokens, np.int32(t))
    logits.append(out)
    if t == 1:
      cache = jax.jit(decoding_fns(case.model, None)[1])(cache, parents)
  whole = np.concatenate([np.take_along_axis(before, parents[..., None], 1), after], -1)
  expected = case.answer(image, question, whole.reshape(2, 3, 3, 5).astype(np.int32)).reshape(
    6, 3, 5, 23
  )
  np.testing.assert_allclose(np.stack(logits[2:], 2), expected[:, :, 2:], atol=1e-5)
  rest = np.full((6, 3, 3), 5, np.int32)
  first = case.answer(
    image,
    question,
    np.concatenate([before, rest], -1).reshape(2, 3, 3, 5).astype(np.int32),
  )
  np.testing.assert_allclose(
    np.stack(logits[:2], 2), first.reshape(6, 3, 5, 23)[:, :, :2], atol=1e-5
  )


def test_decoder_is_causal(asymmetric, inputs):
  image, question, _ = inputs
  ids = np.random.default_rng(6).integers(4, 23, (2, 3, 3, 5)).astype(np.int32)
  plain = asymmetric.answer(image, question, ids)
  others = ids.copy()  # the first call may still be reading
  others[..., 2] = (ids[..., 2] - 3) % 19 + 4
  changed = asymmetric.answer(image, question, others)
  np.testing.assert_allclose(changed[..., :2, :], plain[..., :2, :], atol=1e-6)
  assert np.abs(changed[..., 2:, :] - plain[..., 2:, :]).max() > 0.1
