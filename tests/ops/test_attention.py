"""Each form of attention equals the reference, on its platform and on a mesh."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mplug_jax.ops import attention
from mplug_jax.ops.attention import attention as attend
from mplug_jax.ops.attention import flash_tpu
from mplug_jax.parallel import mesh as mesh_lib

ROWS, HEADS, WIDTH = 2, 3, 8


def arrays(length, keys, rows=ROWS, heads=HEADS, width=WIDTH, dtype=np.float32):
  rng = np.random.default_rng(0)
  shapes = [(rows, heads, n, width) for n in (length, keys, keys, length)]
  return [rng.normal(size=shape).astype(np.float32).astype(dtype) for shape in shapes]


def mask_of(kind, length, keys, rows=ROWS):
  rng = np.random.default_rng(1)
  if kind == "causal":
    return np.tril(np.ones((length, keys), bool))[None, None] & (
      rng.random((rows, 1, 1, keys)) < 0.7
    )  # its first rows may be empty
  if kind == "none":
    return None
  mask = (
    rng.random(
      {"keys": (rows, 1, 1, keys), "empty": (rows, 1, 1, keys), "heads": (1, HEADS, length, keys)}[
        kind
      ]
    )
    < 0.6
  )
  if kind == "empty":
    mask[0] = False
  return mask


def value_and_gradients(attention_impl, inputs, mask, rate=0.0, rng=None):
  query, key, value, cotangent = inputs
  out, gradients = jax.vjp(
    lambda *x: attend(*x, mask, rate, rng, attention_impl), query, key, value
  )
  return out, *gradients(cotangent)


def check_equal(ours, plain, atol):
  for name, a, b in zip(("out", "query", "key", "value"), ours, plain, strict=True):
    np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), atol=atol, err_msg=name
    )


@pytest.fixture
def blocked(monkeypatch):
  monkeypatch.setattr(attention, "BLOCKED_FROM", 1)


def is_blocked(inputs, mask):
  return "while" in jax.jit(lambda *x: attend(*x, mask)).lower(*inputs[:3]).as_text()


@pytest.mark.parametrize("kind", ["none", "keys", "empty", "causal", "heads"])
def test_blocked_equals_plain(blocked, kind):
  inputs, mask = arrays(5, 7), mask_of(kind, 5, 7)
  assert is_blocked(inputs, mask)

  @jax.jit
  def run(key, *inputs):
    return [
      [value_and_gradients(impl, inputs, mask, rate, key) for impl in ("auto", "reference")]
      for rate in (0.0, 0.4)  # the same probabilities are dropped
    ]

  results = jax.device_get(run(jax.random.key(3), *inputs))
  for ours, plain in results:
    check_equal(ours, plain, 2e-6)
  if kind == "empty":
    mean = np.broadcast_to(inputs[2][0].mean(1)[:, None], (HEADS, 5, WIDTH))
    np.testing.assert_allclose(results[0][0][0][0], mean, atol=1e-6)


def test_short_texts_and_the_reference_setting_use_the_reference(monkeypatch):
  inputs = arrays(5, 7)
  assert not is_blocked(inputs, None)
  monkeypatch.setattr(attention, "BLOCKED_FROM", 1)
  assert (
    "while"
    not in jax.jit(lambda *x: attend(*x, attention_impl="reference")).lower(*inputs[:3]).as_text()
  )


def test_blocked_on_a_mesh_equals_one_device_without_collectives(blocked):
  inputs, mask, key = (
    arrays(5, 7, rows=4, heads=4),
    mask_of("keys", 5, 7, rows=4),
    jax.random.key(5),
  )

  def run(mask, *x):
    return value_and_gradients("auto", x, mask, 0.3, key)

  plain = jax.jit(lambda *x: value_and_gradients("reference", x, mask, 0.3, key))(*inputs)
  mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  place = NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, place) for x in inputs]
    compiled = (
      jax.jit(run)
      .lower(jax.device_put(mask, NamedSharding(mesh, P(("data", "fsdp")))), *placed)
      .compile()
    )
    ours = compiled(jax.device_put(mask, NamedSharding(mesh, P(("data", "fsdp")))), *placed)
  check_equal(ours, plain, 2e-6)
  text = compiled.as_text()
  assert "while(" in text
  assert not any(
    f"{name}(" in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute")
  )
  assert ours[0].sharding.spec == place.spec
  with jax.set_mesh(mesh):  # rows that do not divide over it
    assert not is_blocked(arrays(5, 7, rows=3, heads=4), None)


def kernels_in(function, *args, platforms=("tpu",)):
  return (
    export.export(jax.jit(function), platforms=platforms)(*args)
    .mlir_module()
    .count("tpu_custom_call")
  )


def test_tpu_programs_contain_the_flash_kernel():
  def backward(mask, *inputs, rate=0.0):
    return value_and_gradients("auto", inputs, mask, rate, jax.random.key(0))

  inputs = arrays(577, 577, width=64, dtype=jnp.bfloat16)
  assert (
    kernels_in(backward, None, *inputs) == 3
  )  # forward, backward to the query, to key and value
  assert kernels_in(lambda *x: attend(*x), *inputs[:3]) == 1
  assert kernels_in(backward, mask_of("keys", 577, 577), *inputs) == 3
  assert (
    kernels_in(
      lambda *x: attend(*x, attention_impl="reference"),
      *inputs[:3],
      platforms=("tpu", "cpu", "cuda"),
    )
    == 0
  )
  for other in (
    kernels_in(lambda *x: backward(None, *x, rate=0.1), *inputs),  # drops probabilities
    kernels_in(backward, mask_of("heads", 577, 577), *inputs),
    kernels_in(backward, None, *inputs, platforms=("cpu",)),
    kernels_in(backward, None, *arrays(32, 577, width=64)),
  ):
    assert other == 0


def test_tpu_kernel_on_a_mesh_runs_per_shard():
  mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  place = NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
  inputs = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    for x in arrays(300, 300, rows=4, heads=4, width=64)
  ]
  with jax.set_mesh(mesh):
    module = export.export(
      jax.jit(lambda *x: value_and_gradients("auto", x, None)), platforms=["tpu"]
    )(*inputs).mlir_module()
  calls = [line for line in module.splitlines() if "tpu_custom_call" in line]
  assert len(calls) == 3
  assert all("tensor<1x2x384x64xf32>" in line for line in calls)


def test_private_functions_of_jax_keep_their_signatures():
  kernel = flash_tpu._kernel()
  forward = inspect.signature(kernel._flash_attention_fwd).parameters
  assert " ".join(forward) == (
    "q k v ab segment_ids save_residuals causal sm_scale block_sizes debug"
  )
  backward = inspect.signature(kernel._flash_attention_bwd).parameters
  assert " ".join(backward) == "save_residuals causal sm_scale block_sizes debug residuals do"
  assert kernel.SegmentIds._fields == ("q", "kv")


@pytest.mark.parametrize(
  "kind",
  [
    "empty",
    pytest.param("none", marks=pytest.mark.slow),
    pytest.param("keys", marks=pytest.mark.slow),
  ],
)
def test_flash_kernel_equals_plain(kind):
  """The TPU kernel in Pallas's interpreter, at lengths that need padding."""
  length, keys = (130, 200) if kind == "keys" else (70, 90)
  inputs = arrays(length, keys, heads=2)
  mask = mask_of(kind, length, keys)
  plain = jax.jit(lambda *x: value_and_gradients("reference", x, mask))(*inputs)
  with pltpu.force_tpu_interpret_mode():

    @jax.jit
    def run(query, key, value, cotangent):
      arrays = query, key, value
      out, largest, inverse = flash_tpu._flash_forward(0.0, *arrays, mask, None)
      saved = out, largest, inverse, cotangent
      return out, *flash_tpu._flash_backward(0.0, *arrays, mask, None, *saved)

    out, *gradients = run(*inputs)
  check_equal((out, *gradients), plain, 5e-6)


def test_cudnn_runs_only_in_half_precision_without_masks(monkeypatch):
  """No GPU is present here, so XLA's implementation serves the call."""
  calls = []

  def dot_product_attention(*args, implementation):
    calls.append(implementation)
    return original(*args)

  original = jax.nn.dot_product_attention
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax.nn, "dot_product_attention", dot_product_attention)
  inputs = arrays(300, 257, dtype=jnp.bfloat16)

  @jax.jit
  def both(*inputs):
    return attend(*inputs), attend(*inputs, attention_impl="reference")

  out, plain = both(*inputs[:3])
  assert calls == ["cudnn"]
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(np.float32), plain.astype(np.float32), atol=0.02)
  key, mask = jax.random.key(0), mask_of("keys", 300, 257)
  for options, others in (
    ((), arrays(300, 257)),
    ((mask,), inputs),
    ((None, 0.1, key), inputs),
  ):
    jax.make_jaxpr(lambda *x, options=options: attend(*x, *options))(*others[:3])
  assert len(calls) == 1
