"""Each form of attention equals the reference, on its platform and on a mesh."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import pallas
from jax.sharding import NamedSharding

from mplug_jax.ops import attention
from mplug_jax.ops.attention import attention as attend
from mplug_jax.ops.attention import common, kernel_gpu, kernel_tpu
from mplug_jax.parallel import mesh as mesh_lib
from tests.support.paths import ROOT

ROWS, HEADS, WIDTH = 2, 3, 8


def arrays(length, keys, rows=ROWS, heads=HEADS, width=WIDTH, dtype=np.float32):
  """Query, key, value, and the cotangent of the output."""
  rng = np.random.default_rng(0)
  shapes = [(rows, n, heads * width) for n in (length, keys, keys, length)]
  return [rng.normal(size=shape).astype(np.float32).astype(dtype) for shape in shapes]


def mask_of(kind, keys, rows=ROWS):
  """Returns the mask of a kind; that of "empty" allows no key in the first row."""
  if kind == "none":
    return None
  mask = np.random.default_rng(1).random((1 if kind == "shared" else rows, keys)) < 0.6
  if kind == "empty":
    mask[0] = False
  return mask


def value_and_gradients(attention_impl, inputs, mask, *, heads=HEADS, **options):
  *inputs, cotangent = inputs
  out, gradients = jax.vjp(
    lambda *x: attend(*x, heads, mask, attention_impl=attention_impl, **options), *inputs
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


def is_blocked(inputs, mask=None, heads=HEADS):
  return "while" in jax.jit(lambda *x: attend(*x, heads, mask)).lower(*inputs[:3]).as_text()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "keys", "empty", "shared"])
def test_blocked_equals_plain(blocked, kind, causal):
  inputs, mask = arrays(5, 7), mask_of(kind, 7)
  assert is_blocked(inputs, mask)

  @jax.jit
  def run(key, *inputs):
    return [
      [
        value_and_gradients(impl, inputs, mask, causal=causal, rate=rate, rng=key)
        for impl in ("auto", "reference")
      ]
      for rate in (0.0, 0.4)  # the same probabilities are dropped
    ]

  results = jax.device_get(run(jax.random.key(3), *inputs))
  for ours, plain in results:
    check_equal(ours, plain, 2e-6)
  if kind == "empty":
    mean = np.broadcast_to(inputs[2][0].mean(0), (5, HEADS * WIDTH))
    np.testing.assert_allclose(results[0][0][0][0], mean, atol=1e-6)


def test_causal_queries_ignore_later_keys():
  inputs = arrays(6, 6)

  @jax.jit
  def run(*inputs):
    until = [attend(*(x[:, : i + 1] for x in inputs), HEADS)[:, i] for i in range(6)]
    return attend(*inputs, HEADS, causal=True), jnp.stack(until, 1)

  np.testing.assert_allclose(*run(*inputs[:3]), atol=1e-6)


def test_short_texts_and_the_reference_setting_use_the_reference(monkeypatch):
  inputs = arrays(5, 7)
  assert not is_blocked(inputs)
  monkeypatch.setattr(attention, "BLOCKED_FROM", 1)
  reference = jax.jit(lambda *x: attend(*x, HEADS, attention_impl="reference"))
  assert "while" not in reference.lower(*inputs[:3]).as_text()


def test_blocked_on_a_mesh_equals_one_device_without_collectives(blocked):
  inputs, mask, key = arrays(5, 7, rows=4, heads=4), mask_of("keys", 7, rows=4), jax.random.key(5)

  def run(mask, *x):
    return value_and_gradients("auto", x, mask, heads=4, rate=0.3, rng=key)

  plain = jax.jit(lambda *x: value_and_gradients("reference", x, mask, heads=4, rate=0.3, rng=key))(
    *inputs
  )
  mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  place = NamedSharding(mesh, common.CHANNELS)
  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, place) for x in inputs]
    placed_mask = jax.device_put(mask, NamedSharding(mesh, common.ROWS))
    compiled = jax.jit(run).lower(placed_mask, *placed).compile()
    ours = compiled(placed_mask, *placed)
  check_equal(ours, plain, 2e-6)
  text = compiled.as_text()
  assert "while(" in text
  assert not any(
    f"{name}(" in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute")
  )
  assert ours[0].sharding.spec == place.spec
  with jax.set_mesh(mesh):  # rows that do not divide over it
    assert not is_blocked(arrays(5, 7, rows=3, heads=4), heads=4)


def kernels_in(function, *args, platforms=("tpu",)):
  return (
    export.export(jax.jit(function), platforms=platforms)(*args)
    .mlir_module()
    .count("tpu_custom_call")
  )


def test_tpu_programs_contain_the_kernels():
  def backward(mask, *inputs, **options):
    return value_and_gradients("auto", inputs, mask, rng=jax.random.key(0), **options)

  inputs = arrays(577, 577, width=64, dtype=jnp.bfloat16)
  assert kernels_in(lambda *x: attend(*x, HEADS), *inputs[:3]) == 1
  assert kernels_in(backward, None, *inputs) == 2
  assert kernels_in(lambda *x: backward(mask_of("keys", 577), *x, rate=0.1), *inputs) == 2
  texts = arrays(25, 25, width=64, dtype=jnp.bfloat16)
  assert kernels_in(lambda *x: backward(mask_of("keys", 25), *x, causal=True), *texts) == 2
  reference = {"attention_impl": "reference"}
  every = ("tpu", "cpu", "cuda")
  assert not kernels_in(lambda *x: attend(*x, HEADS, **reference), *inputs[:3], platforms=every)
  assert not kernels_in(backward, None, *inputs, platforms=("cpu",))
  assert kernels_in(backward, None, *inputs, platforms=("cpu", "tpu")) == 2


def test_only_the_form_of_the_platform_is_traced(monkeypatch):
  """Tracing the kernels of all platforms took a third of the time of tracing a train step."""
  inputs = arrays(41, 43, width=64)  # of no other test, whose trace would be reused

  def pallas_call(*args, **options):
    raise AssertionError("a kernel is traced")

  monkeypatch.setattr(pallas, "pallas_call", pallas_call)
  jax.jit(lambda *x: value_and_gradients("auto", x, None)).lower(*inputs)
  for platform in ("tpu", "cuda"):
    with pytest.raises(AssertionError, match="a kernel is traced"):
      kernels_in(lambda *x: value_and_gradients("auto", x, None), *inputs, platforms=(platform,))


def test_vmap_equals_a_loop():
  inputs, mask = arrays(5, 7), mask_of("keys", 7)
  options = {"rate": 0.2, "rng": jax.random.key(0)}

  def run(*inputs):
    return value_and_gradients("auto", inputs, mask, **options)

  both = jax.vmap(run)(*(np.stack([x, 2 * x]) for x in inputs))
  check_equal([x[0] for x in both], run(*inputs), 1e-6)
  check_equal([x[1] for x in both], run(*(2 * x for x in inputs)), 1e-5)


def test_tpu_kernels_on_a_mesh_run_per_shard():
  mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  place = NamedSharding(mesh, common.CHANNELS)
  inputs = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    for x in arrays(300, 300, rows=4, heads=4, width=64)
  ]
  with jax.set_mesh(mesh):
    module = export.export(
      jax.jit(lambda *x: value_and_gradients("auto", x, None, heads=4)), platforms=["tpu"]
    )(*inputs).mlir_module()
  calls = [line for line in module.splitlines() if "tpu_custom_call" in line]
  assert len(calls) == 2
  assert all("tensor<1x300x128xf32>" in line for line in calls)


def in_interpreter(kernels, inputs, mask, *, heads=HEADS, rate=0.0, causal=False, rng=None):
  """The kernels of a module in Pallas's interpreter: output and gradients."""
  *inputs, cotangent = inputs
  args = (common.Options(heads, rate, causal), *inputs, mask, rng)
  out, *saved = kernels.forward(*args, interpret=True)
  return out, *kernels.backward(*args, out, *saved, cotangent, interpret=True)


# Lengths of texts, of 577 image tokens and of both are no multiples of 8 or 128.
@pytest.mark.parametrize(
  ("length", "keys", "kind", "causal", "rate"),
  [
    (25, 25, "keys", True, 0.1),
    (25, 77, "empty", False, 0.1),
    (35, 35, "none", False, 0.0),
    (130, 130, "shared", False, 0.3),
    (9, 200, "keys", False, 0.0),
    pytest.param(577, 577, "none", False, 0.1, marks=pytest.mark.slow),
    pytest.param(602, 602, "keys", False, 0.1, marks=pytest.mark.slow),
    pytest.param(100, 602, "keys", False, 0.1, marks=pytest.mark.slow),
    pytest.param(1297, 1297, "none", False, 0.1, marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize(
  ("kernels", "sizes"),
  [
    (kernel_tpu, {"rows": ROWS, "heads": HEADS, "width": WIDTH}),
    (kernel_tpu, {"rows": 4, "heads": 4, "width": 64}),
    (kernel_gpu, {"rows": ROWS, "heads": HEADS, "width": 32}),
  ],
)
def test_kernels_equal_plain(length, keys, kind, causal, rate, kernels, sizes):
  inputs, mask = arrays(length, keys, **sizes), mask_of(kind, keys, sizes["rows"])
  options = {
    "heads": sizes["heads"],
    "causal": causal,
    "rate": rate,
    "rng": jax.random.key(2) if rate else None,
  }
  ours = jax.jit(lambda *x: in_interpreter(kernels, x, mask, **options))(*inputs)
  check_equal(
    ours, jax.jit(lambda *x: value_and_gradients("reference", x, mask, **options))(*inputs), 5e-6
  )


@pytest.mark.parametrize("queries", [16, 48])
def test_blocks_of_queries_change_nothing(monkeypatch, queries):
  """The last of them is not full; gradients of key and value are summed over all."""
  choose = kernel_tpu.choose_blocks

  def smaller(*args):
    return choose(*args)._replace(rows=1, queries=queries)

  inputs, mask = arrays(70, 90), mask_of("empty", 90)
  options = {"causal": True, "rate": 0.2, "rng": jax.random.key(2)}
  whole = jax.jit(lambda *x: in_interpreter(kernel_tpu, x, mask, **options))(*inputs)
  monkeypatch.setattr(kernel_tpu, "choose_blocks", smaller)
  check_equal(
    jax.jit(lambda *x: in_interpreter(kernel_tpu, x, mask, **options))(*inputs), whole, 2e-6
  )


@pytest.mark.parametrize("kernels", [kernel_tpu, kernel_gpu])
def test_kernels_drop_the_probabilities_of_the_reference(kernels):
  """With values of one key each, the output shows the mask of dropout, element for element."""
  rows, heads, keys, rate = 4, 2, 64, 0.25
  query, key = np.zeros((2, rows, keys, heads * keys), np.float32)
  value = np.tile(np.eye(keys, dtype=np.float32), (rows, 1, heads))
  rng = jax.random.key(7)
  options = common.Options(heads, rate, False)
  out, *_ = kernels.forward(options, query, key, value, None, rng, interpret=True)
  plain = attend(query, key, value, heads, rate=rate, rng=rng, attention_impl="reference")
  np.testing.assert_array_equal(out == 0, plain == 0)
  assert 0.24 < np.mean(out == 0) < 0.26


@pytest.mark.parametrize("kernels", [kernel_tpu, kernel_gpu])
def test_kernels_on_a_mesh_drop_what_one_device_drops(kernels):
  inputs = arrays(16, 24, rows=8, heads=4, width=16)
  mask = mask_of("keys", 24, 8)
  options = {"heads": 4, "rate": 0.3, "rng": jax.random.key(1)}
  alone = jax.jit(lambda *x: in_interpreter(kernels, x, mask, **options))(*inputs)
  mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, NamedSharding(mesh, common.CHANNELS)) for x in inputs]
    ours = jax.jit(lambda *x: in_interpreter(kernels, x, mask, **options))(*placed)
  check_equal(ours, alone, 2e-6)


@pytest.mark.parametrize("budget", [12, 32])
@pytest.mark.parametrize(("length", "keys"), [(25, 25), (25, 602), (577, 577), (1297, 1297)])
def test_blocks_fit_every_chip(length, keys, budget):
  blocks = kernel_tpu.choose_blocks(16, 12, length, keys, 64, 2, budget * 2**20)
  assert blocks.heads == 2
  assert not 16 % blocks.rows
  assert blocks.queries == length or not blocks.queries % 128


def test_lengths_that_fit_no_block_use_the_reference():
  assert kernel_tpu.choose_blocks(1, 12, 8192, 65536, 64, 2, 12 * 2**20) is None


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
    return attend(*inputs, HEADS), attend(*inputs, HEADS, attention_impl="reference")

  out, plain = both(*inputs[:3])
  assert calls == ["cudnn"]
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(np.float32), plain.astype(np.float32), atol=0.02)
  for options, others in (
    ({}, arrays(300, 257)),
    ({"mask": mask_of("keys", 257)}, inputs),
    ({"causal": True}, inputs),
    ({"rate": 0.1, "rng": jax.random.key(0)}, inputs),
  ):
    jax.make_jaxpr(lambda *x, options=options: attend(*x, HEADS, **options))(*others[:3])
  assert len(calls) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:1x1", "v5p:2x2x1", "v6e:2x2"])
def test_tpu_kernels_compile_for_every_chip(name):
  pytest.importorskip("libtpu")
  script = ROOT / "tests" / "support" / "compile_attention.py"
  run = subprocess.run(
    [sys.executable, str(script), name],
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
  )
  assert run.returncode == 0, run.stderr[-2000:]
  lines = [line.split() for line in run.stdout.splitlines()]
  assert len(lines) == 7
  assert {line[2] for line in lines} == {"2"}
