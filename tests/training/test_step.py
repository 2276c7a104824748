"""One update: the same on every mesh and for every number of microbatches.

Averages, the NaN guard, and that it learns.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from mplug_jax import data, optim
from mplug_jax.checkpoints import manager as checkpoint
from mplug_jax.data.sources import vqa
from mplug_jax.parallel import batches
from mplug_jax.parallel import mesh as mesh_lib
from mplug_jax.training import gradients as gradients_lib
from mplug_jax.training import health as health_lib
from mplug_jax.training import loop
from mplug_jax.training import step as step_lib
from mplug_jax.training.state import TrainState
from tests.support import random_state, tiny_run

MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2))


# ---- VQA on meshes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return tiny_run.tokenizer(tmp_path_factory.mktemp("tokenizer"), tiny_run.config())


class Meshes:
  """The tiny VQA task with dropout on any mesh, with equal state and batch.

  Each mesh has a compiled gradient function.
  """

  def __init__(self, tokenizer):
    # A wide initialization, so that every attention and every gradient matters; at 0.02 the
    # softmaxes are uniform.
    self.tokenizer, self.config = tokenizer, tiny_run.config(model__initializer_range=0.1)
    self.batch = tiny_run.batch(self.config, tokenizer)
    self._built, self._compiled = {}, {}
    self.state = random_state.host_state(self.built((1, 1, 1)), 0.1)
    self.rng = jax.random.key(3)

  def built(self, shape):
    if shape not in self._built:
      c = self.config.copy_and_resolve_references()
      c.mesh.data, c.mesh.fsdp, c.mesh.tensor = shape
      self._built[shape] = loop.build(c, self.tokenizer, 10, 10, jax.devices()[: np.prod(shape)])
    return self._built[shape]

  def place(self, shape, state=None):
    """A state (default: the initial one) on a mesh."""
    abstract = self.built(shape).abstract
    state = (self.state if state is None else state).replace(rng=self.rng)
    return jax.tree.map(lambda x, a: jax.device_put(jnp.asarray(x), a.sharding), state, abstract)

  def gradients(self, shape, state):
    """-> (gradients, loss, {metric: (sum, count)})."""
    built = self.built(shape)
    with jax.set_mesh(built.mesh):
      batch = batches.put_batch(self.batch, built.mesh)
      if shape not in self._compiled:
        self._compiled[shape] = (
          jax.jit(gradients_lib.make_gradients(built.task)).lower(state, batch).compile()
        )
      return self._compiled[shape](state, batch)[:3]


@pytest.fixture(scope="module")
def meshes(tokenizer):
  return Meshes(tokenizer)


@pytest.fixture(scope="module")
def one_device(meshes):
  gradients, loss, metrics = meshes.gradients((1, 1, 1), meshes.place((1, 1, 1)))
  return tiny_run.flat(gradients), float(loss), jax.device_get(metrics)


def _kernel(params):
  return params["visual_encoder"]["blocks"]["mlp"]["up"]["kernel"]


def test_the_reference_is_worth_comparing_with(meshes, one_device):
  """Dropout acts, and only gradients that are zero by construction are below the tolerance."""
  gradients, loss, metrics = one_device
  later = meshes.gradients(
    (1, 1, 1), meshes.place((1, 1, 1), meshes.state.replace(step=jnp.int32(1)))
  )
  assert abs(float(later[1]) - loss) > 1e-3
  # A key bias adds the same number to every score of a query.
  small = [
    name
    for name, g in gradients.items()
    if np.abs(g).max() < 1e-4 and not name.endswith("key/bias")
  ]
  assert not small
  assert metrics["loss_answer"][1] == meshes.batch["question_valid"].sum() == 36


@pytest.mark.parametrize("shape", MESHES)
def test_large_parameters_are_sharded(shape, meshes):
  state = meshes.place(shape)
  kernel = _kernel(state.params)
  fsdp, tensor = shape[1:]
  assert kernel.sharding.shard_shape(kernel.shape) == (2, 64 // fsdp, 256 // tensor)
  assert (
    len({s.data.tobytes() for s in map(jax.device_get, kernel.addressable_shards)}) == fsdp * tensor
  )
  whole = sum(x.size for x in jax.tree.leaves(state.params) if x.sharding.is_fully_replicated)
  assert (whole < 0.1 * sum(x.size for x in jax.tree.leaves(state.params))) == (fsdp * tensor > 1)


@pytest.mark.parametrize(
  "shape", [*(pytest.param(shape, marks=pytest.mark.slow) for shape in MESHES[:2]), MESHES[2]]
)
def test_loss_and_gradients_are_those_of_one_device(shape, meshes, one_device):
  """The mesh of the gate splits data, fsdp and tensor at once."""
  gradients, loss, metrics = meshes.gradients(shape, meshes.place(shape))
  assert float(loss) == pytest.approx(one_device[1], rel=1e-5)
  tiny_run.assert_gradients_equal(tiny_run.flat(gradients), one_device[0])
  for name, pair in one_device[2].items():
    np.testing.assert_allclose(metrics[name], pair, rtol=1e-5, err_msg=name)


def test_initialization_does_not_depend_on_the_mesh(meshes):
  built = meshes.built((2, 2, 2))
  with jax.set_mesh(built.mesh):
    state = built.init()
  assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
    lambda x: x.sharding, built.abstract
  )
  reference = jax.device_get(meshes.built((1, 1, 1)).init().params)
  for (name, ours), expected in zip(
    tiny_run.flat(state.params).items(), jax.tree.leaves(reference)
  ):
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7, err_msg=name)
  # The states that the tests draw have the constants of real ones, and optimizers start at 0.
  for (name, ours), drawn in zip(
    tiny_run.flat(state.params).items(), jax.tree.leaves(meshes.state.params)
  ):
    if ours.std() == 0:
      np.testing.assert_array_equal(ours, drawn, err_msg=name)
  assert not any(x.any() for x in tiny_run.flat(state.opt_state).values())


def test_a_checkpoint_of_one_mesh_goes_on_on_others(meshes, tmp_path):
  """Every array comes back bit for bit.

  The next step has the same keys, hence the same loss and gradients.
  """
  draws = np.random.default_rng(0)
  state = jax.tree.map(
    lambda x: x + draws.normal(0, 0.05, x.shape).astype(x.dtype), meshes.state.replace(step=())
  )
  state = state.replace(step=jnp.int32(5))
  saved = meshes.place((2, 2, 2), state)
  manager = checkpoint.Manager(tmp_path)
  manager.save(5, saved, {})
  gradients, loss, _ = meshes.gradients((2, 2, 2), saved)
  gradients = tiny_run.flat(gradients)
  for shape in ((8, 1, 1), (1, 1, 1)):
    built = meshes.built(shape)
    restored, _ = manager.restore(built.abstract)
    assert _kernel(restored.params).sharding == _kernel(built.abstract.params).sharding
    for (name, ours), expected in zip(
      tiny_run.flat(restored).items(), tiny_run.flat(saved).values()
    ):
      np.testing.assert_array_equal(ours, expected, err_msg=name)
    if shape != (1, 1, 1):
      continue
    again = meshes.gradients(shape, restored)
    assert float(again[1]) == pytest.approx(float(loss), rel=1e-5)
    tiny_run.assert_gradients_equal(tiny_run.flat(again[0]), gradients)
  manager.close()


# ---- microbatches


def test_four_microbatches_equal_one_with_uneven_counts(meshes):
  """On a mesh too: every microbatch takes rows from every device."""
  c = tiny_run.config(
    model__initializer_range=0.1,
    model__dropout_rate=0.0,
    model__attention_dropout_rate=0.0,
    model__vision_attention_dropout_rate=0.0,
    mesh__data=2,
  )
  results = []
  for devices, parts in ((1, 1), (2, 4)):
    c.mesh.data = devices
    built = loop.build(c, meshes.tokenizer, 10, 10, jax.devices()[:devices])
    state = jax.tree.map(
      lambda x, a: jax.device_put(jnp.asarray(x), a.sharding),
      meshes.state.replace(rng=meshes.rng),
      built.abstract,
    )
    with jax.set_mesh(built.mesh):
      out = jax.jit(gradients_lib.make_gradients(built.task, parts))(
        state, batches.put_batch(meshes.batch, built.mesh)
      )
    results.append((tiny_run.flat(out[0]), float(out[1]), jax.device_get(out[2])))
  (whole, loss, metrics), (parts, parts_loss, parts_metrics) = results
  assert parts_loss == pytest.approx(loss, rel=1e-5)
  for name, expected in whole.items():
    np.testing.assert_allclose(
      parts[name], expected, rtol=0, atol=max(1e-5 * np.abs(expected).max(), 1e-7), err_msg=name
    )
  for name in ("loss_answer", "token_accuracy"):
    np.testing.assert_allclose(parts_metrics[name], metrics[name], rtol=1e-5, err_msg=name)


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


# ---- learning


def test_eight_images_are_memorized(tokenizer):
  """Without dropout the loss goes to zero, and generation gives each image's trained answers."""
  c = tiny_run.config(
    model__dropout_rate=0.0,
    model__attention_dropout_rate=0.0,
    model__vision_attention_dropout_rate=0.0,
    data__questions_per_image=4,
    data__augment__flip=0.0,
    optim__schedule__name="constant",
    optim__lr=3e-3,
    optim__weight_decay=0.0,
    model__initializer_range=0.05,
  )
  source = vqa.get(c.data, "train")
  records = [
    {**source[i], "questions": [q for q in source[i]["questions"] if "what" in q["question"]][:4]}
    for i in range(40)
  ]
  records = [r for r in records if r["questions"]][:8]
  transform = data.make_transform(c, tokenizer, train=False)
  examples = [transform(i, r, None) | {"mask": np.True_} for i, r in enumerate(records)]
  batch = {k: jnp.asarray(np.stack([e[k] for e in examples])) for k in examples[0]}
  built = loop.build(c, tokenizer, 1000, 1000, jax.devices()[:1])
  state, healthy, steps = random_state.state(built, c.model.initializer_range), jnp.bool_(True), 0
  while steps < 400:
    for _ in range(20):
      state, metrics, health = built.train_step(state, batch, healthy)
    steps += 20
    if float(metrics["loss"][0]) < 0.01:
      break
  assert float(metrics["loss"][0]) < 0.01
  assert bool(health["ok"])
  out = built.predict["generate"](state.params, batch)
  said = {
    (q["question_id"], tokenizer.decode(out["tokens"][row, i, : out["length"][row, i]]))
    for row, r in enumerate(records)
    for i, q in enumerate(r["questions"])
  }
  truth = {(q["question_id"], q["answers"][0]) for r in records for q in r["questions"]}
  assert len({answer for _, answer in truth}) >= 4
  assert said == truth
