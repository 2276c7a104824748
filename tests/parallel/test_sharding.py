"""Sharding rules: every parameter of every preset has one; other state follows the parameters."""

import functools
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mplug_jax import optim
from mplug_jax.parallel import batches, rules
from mplug_jax.parallel import mesh as mesh_lib
from mplug_jax.training.build import build
from tests.support import mesh_case, tiny_run

# Numbers of parameters: what the official VQA forward passes use, with the position tables of base
# at 384 and large at 336 pixels. The huge model was never released; it is published as 1.1 billion
# with the parts that VQA does not use (CLIP's text tower alone is 0.12).
SIZES = {"base": 344_683_578, "large": 565_252_410, "huge": 972_804_922}


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
  monkeypatch.setattr(rules, "_warnings", set())


def _mesh(data=1, fsdp=1, tensor=1):
  return mesh_lib.make_mesh(
    {"data": data, "fsdp": fsdp, "tensor": tensor}, jax.devices()[: data * fsdp * tensor]
  )


def _config(size):
  return tiny_run.config(size, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, ema__decay=0.995)


@functools.cache
def _built(size):
  """Returns the build of a preset on a mesh (2, 2, 2)."""
  tokenizer = types.SimpleNamespace(vocab_size=30522, pad_id=0, bos_id=1, eos_id=2)
  return build(_config(size), tokenizer, 1000, 1000)


def _device_bytes(leaf):
  return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize


@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_and_moment_of_the_presets_is_sharded(size, caplog):
  built = _built(size)
  state = built.abstract
  assert sum(x.size for x in jax.tree.leaves(state.params)) == SIZES[size]
  shardings = rules.shardings_for(state, state.params, built.mesh)  # again, for what it says
  assert shardings == jax.tree.map(lambda x: x.sharding, state)
  # The vocabulary of 30,522 divides over 2; no parameter is without a rule and none stays whole for
  # want of divisibility.
  assert not caplog.records
  for params in (state.params, state.opt_state.mu, state.opt_state.nu, state.ema_params):
    leaves = jax.tree.leaves(params)
    total = sum(x.size * x.dtype.itemsize for x in leaves)
    mine = sum(map(_device_bytes, leaves))
    # Over fsdp x tensor = 4; position tables, patch embedding and a few kernels go over fsdp alone,
    # scales and biases stay whole.
    assert total / 4 <= mine <= 1.02 * total / 4
  # No leaf above 200 kB is whole anywhere in the state.
  for name, leaf in (
    (rules.path_name(p), x) for p, x in jax.tree.leaves_with_path(state.replace(rng=()))
  ):
    assert leaf.size * leaf.dtype.itemsize <= 2e5 or not leaf.sharding.is_fully_replicated, name


def test_depth_is_never_sharded_and_the_pairs_of_a_block_agree():
  """Column-parallel, then row-parallel: one product splits over "tensor", the next sums over it."""
  state = mesh_case.on_mesh(_built("base"), (1, 4, 2)).abstract
  blocks = state.params["visual_encoder"]["blocks"]

  def spec(x):
    return tuple(x.sharding.spec)

  assert spec(blocks["mlp"]["up"]["kernel"]) == (None, "fsdp", "tensor")
  assert spec(blocks["mlp"]["down"]["kernel"]) == (None, "tensor", "fsdp")
  for name in ("query", "key", "value"):
    assert spec(blocks["attention"][name]["kernel"]) == (None, "fsdp", "tensor")
    assert spec(blocks["attention"][name]["bias"]) == (None, "tensor")
  assert spec(blocks["attention"]["out"]["kernel"]) == (None, "tensor", "fsdp")
  assert state.params["text_decoder"]["embeddings"]["word"]["embedding"].sharding.shard_shape(
    (30522, 768)
  ) == (15261, 192)
  for leaf in jax.tree.leaves(state.params["text_decoder"]["layers"]):
    assert leaf.shape[0] == 12
    assert leaf.sharding.shard_shape(leaf.shape)[0] == 12


def test_moments_and_average_live_where_their_parameter_lives():
  state = _built("base").abstract
  expected = jax.tree.map(lambda x: (x.shape, x.sharding), state.params)
  for tree in (state.opt_state.mu, state.opt_state.nu, state.ema_params):
    assert jax.tree.map(lambda x: (x.shape, x.sharding), tree) == expected
  for leaf in (state.step, state.rng, state.opt_state.count):
    assert leaf.sharding.is_fully_replicated


def test_columns_of_queues_are_split_as_parameters_are():
  queues = {
    "image_queue": jax.ShapeDtypeStruct((16, 64), jnp.float32),
    "idx_queue": jax.ShapeDtypeStruct((1, 64), jnp.int32),
    "queue_ptr": jax.ShapeDtypeStruct((1,), jnp.int32),
    "text_queue": jax.ShapeDtypeStruct((16, 63), jnp.float32),
  }
  shardings = rules.shardings_for(
    {"extra": queues}, {}, mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  )["extra"]
  assert {name: tuple(x.spec) for name, x in shardings.items()} == {
    "image_queue": (None, "fsdp"),
    "idx_queue": (None, "fsdp"),
    "queue_ptr": (),
    "text_queue": (),
  }


def test_factored_moments_drop_the_missing_dimension():
  built, config = _built("base"), _config("base")
  config.optim.name = "adafactor"
  optimizer, _ = optim.make(config.optim, built.abstract.params, 1000, 1000)
  state = built.abstract.replace(opt_state=jax.eval_shape(optimizer.init, built.abstract.params))
  state = mesh_case.on_mesh(built._replace(abstract=state), (1, 4, 2)).abstract
  factored = next(
    s
    for s in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "v_row"))
    if hasattr(s, "v_row")
  )
  up = ("visual_encoder", "blocks", "mlp", "up", "kernel")

  def leaf(tree):
    for name in up:
      tree = tree[name]
    return tree

  assert leaf(state.params).shape == (12, 768, 3072)
  rows, columns = leaf(factored.v_row), leaf(factored.v_col)
  assert {rows.shape, columns.shape} == {(12, 768), (12, 3072)}
  for x in (rows, columns):
    assert tuple(x.sharding.spec) == (None, {768: "fsdp", 3072: "tensor"}[x.shape[1]])
  bias = state.params["visual_encoder"]["blocks"]["mlp"]["up"]["bias"]
  assert factored.v["visual_encoder"]["blocks"]["mlp"]["up"]["bias"].sharding == bias.sharding
  # A parameter that is factored leaves f32[1] in the place of its full second moment.
  assert leaf(factored.v).sharding.is_fully_replicated


def test_a_dimension_that_does_not_divide_stays_whole_and_is_said_once(caplog):
  mesh = _mesh(fsdp=4, tensor=2)
  for _ in range(2):
    assert rules.parameter_spec("embeddings/word/embedding", (319, 64), mesh) == P(None, "fsdp")
  assert rules.parameter_spec("embeddings/word/embedding", (320, 64), mesh) == P("tensor", "fsdp")
  assert [r.getMessage() for r in caplog.records] == [
    "embeddings/word/embedding: dimension 0 of size 319 is not divisible by mesh axis 'tensor' of "
    "size 2 and stays whole."
  ]


def test_a_parameter_without_a_rule_is_replicated_and_is_said_once(caplog):
  mesh = _mesh(fsdp=4, tensor=2)
  tree = {"adapter": {"matrix": jax.ShapeDtypeStruct((64, 64), jnp.float32)}}
  for _ in range(2):
    assert rules.shardings_for(tree, tree, mesh)["adapter"]["matrix"].is_fully_replicated
  (record,) = caplog.records
  assert record.levelno == logging.WARNING
  assert "adapter/matrix" in record.getMessage()
  assert "parallel.rules.RULES" in record.getMessage()


def test_make_mesh_fills_the_rest_and_refuses_what_does_not_fit():
  assert dict(mesh_lib.make_mesh({"data": -1, "fsdp": 2, "tensor": 2}).shape) == {
    "data": 2,
    "fsdp": 2,
    "tensor": 2,
  }
  assert dict(mesh_lib.make_mesh({"data": 2, "fsdp": -1, "tensor": 1}).shape) == {
    "data": 2,
    "fsdp": 4,
    "tensor": 1,
  }
  assert (
    dict(mesh_lib.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.devices()[:3]).shape)["data"]
    == 3
  )
  for sizes in (
    (3, 1, 1),
    (-1, 3, 1),
    (-1, -1, 1),
    (16, 1, 1),
    (-1, 16, 1),
    (0, 1, 8),
    (-1, 0, 1),
    (-2, 2, -2),
  ):
    with pytest.raises(
      ValueError, match="does not fit 8 devices: .* one of them may be -1"
    ) as error:
      mesh_lib.make_mesh(dict(zip(mesh_lib.AXES, sizes)))
    assert str(dict(zip(mesh_lib.AXES, sizes))) in str(error.value)


def test_make_mesh_keeps_the_tensor_axis_inside_a_process():
  """Else two processes would call different rows by the same number."""
  devices = [types.SimpleNamespace(process_index=i // 2) for i in range(4)]
  for sizes in ((1, 1, 4), (1, -1, 4)):
    with pytest.raises(
      ValueError, match="data x fsdp = 1, which must be a multiple of the 2 processes"
    ):
      mesh_lib.make_mesh(dict(zip(mesh_lib.AXES, sizes)), devices)


def test_put_batch_splits_rows_over_data_and_fsdp_in_order():
  rows = np.arange(24, dtype=np.int32).reshape(8, 3)
  mesh = _mesh(2, 2, 2)
  placed = batches.put_batch({"x": rows, "valid": rows[:, 0] > 3}, mesh)
  np.testing.assert_array_equal(placed["x"], rows)
  assert placed["valid"].dtype == bool
  for shard in placed["x"].addressable_shards:
    data, fsdp, _ = (int(i[0]) for i in np.where(mesh.devices == shard.device))
    first = 2 * (2 * data + fsdp)
    np.testing.assert_array_equal(shard.data, rows[first : first + 2])


def test_put_batch_says_what_a_batch_must_divide_by():
  with pytest.raises(
    ValueError,
    match="batch of 6 rows .* data x fsdp = 4 devices; make config.batch_size .* a multiple of it",
  ):
    batches.put_batch({"x": np.zeros((6, 3))}, _mesh(2, 2, 2))


def test_constrain_splits_rows_inside_a_mesh_alone():
  x = jnp.arange(16.0).reshape(8, 2)
  assert rules.constrain(x) is x
  mesh = _mesh(2, 2, 2)
  with jax.set_mesh(mesh):
    out = jax.jit(lambda x: rules.constrain(x) + 1)(x)
    odd = jax.jit(lambda x: rules.constrain(x) + 1)(x[:6])
  assert out.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"))), 2)
  np.testing.assert_array_equal(out, x + 1)
  np.testing.assert_array_equal(odd, x[:6] + 1)
