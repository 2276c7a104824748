"""One update: the same on every mesh and for every number of microbatches.

Averages, the NaN guard, and that it learns.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax import data
from mplug_jax.checkpoints import manager as checkpoint
from mplug_jax.data.sources import vqa
from mplug_jax.training import loop
from tests.support import mesh_case, random_state, tiny_run

MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2))


# ---- VQA on meshes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return tiny_run.tokenizer(tmp_path_factory.mktemp("tokenizer"), tiny_run.config())


class Meshes(mesh_case.MeshCase):
  """The tiny VQA task on any mesh, with dropout unless `changes` turn it off."""

  def __init__(self, tokenizer, **changes):
    # A wide initialization, so that every attention and every gradient matters; at 0.02 the
    # softmaxes are uniform.
    self.tokenizer = tokenizer
    self.config = tiny_run.config(model__initializer_range=0.1, **changes)
    self.batch = tiny_run.batch(self.config, tokenizer)
    self.built = loop.build(self.config, tokenizer, 10, 10, jax.devices()[:1])
    self.state = random_state.host_state(self.built, 0.1).replace(opt_state=())


@pytest.fixture(scope="module")
def meshes(tokenizer):
  return Meshes(tokenizer)


@pytest.fixture(scope="module")
def one_device(meshes):
  gradients, loss, metrics = meshes.gradients()
  return tiny_run.flat(gradients), float(loss), jax.device_get(metrics)


def _kernel(params):
  return params["visual_encoder"]["blocks"]["mlp"]["up"]["kernel"]


def test_the_reference_is_worth_comparing_with(meshes, one_device):
  """Dropout acts, and only gradients that are zero by construction are below the tolerance."""
  gradients, loss, metrics = one_device
  later = meshes.gradients(state=meshes.place(state=meshes.state.replace(step=jnp.int32(1))))
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
  gradients, loss, metrics = meshes.gradients(shape)
  assert float(loss) == pytest.approx(one_device[1], rel=1e-5)
  tiny_run.assert_gradients_equal(tiny_run.flat(gradients), one_device[0])
  for name, pair in one_device[2].items():
    np.testing.assert_allclose(metrics[name], pair, rtol=1e-5, err_msg=name)


def test_initialization_does_not_depend_on_the_mesh(meshes):
  c = meshes.config.copy_and_resolve_references()
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = (2, 2, 2)
  built = loop.build(c, meshes.tokenizer, 10, 10)
  assert built.abstract == mesh_case.on_mesh(meshes.built, (2, 2, 2)).abstract
  with jax.set_mesh(built.mesh):
    state = built.init()
  assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
    lambda x: x.sharding, built.abstract
  )
  reference = jax.device_get(meshes.built.init().params)
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
    lambda x: x + draws.normal(0, 0.05, x.shape).astype(x.dtype),
    random_state.host_state(meshes.built, 0.1).replace(step=()),
  )
  state = state.replace(step=jnp.int32(5), rng=meshes.rng)
  saved = mesh_case.place(state, mesh_case.on_mesh(meshes.built, (2, 2, 2)).abstract)
  manager = checkpoint.Manager(tmp_path)
  manager.save(5, saved, {})
  gradients, loss, _ = meshes.gradients((2, 2, 2), state=saved.replace(opt_state=()))
  gradients = tiny_run.flat(gradients)
  for shape in ((8, 1, 1), (1, 1, 1)):
    abstract = mesh_case.on_mesh(meshes.built, shape).abstract
    restored, _ = manager.restore(abstract)
    assert _kernel(restored.params).sharding == _kernel(abstract.params).sharding
    for (name, ours), expected in zip(
      tiny_run.flat(restored).items(), tiny_run.flat(saved).values()
    ):
      np.testing.assert_array_equal(ours, expected, err_msg=name)
    if shape != (1, 1, 1):
      continue
    again = meshes.gradients(shape, state=restored.replace(opt_state=()))
    assert float(again[1]) == pytest.approx(float(loss), rel=1e-5)
    tiny_run.assert_gradients_equal(tiny_run.flat(again[0]), gradients)
  manager.close()


# ---- without dropout: microbatches, learning


class Learner(mesh_case.MeshCase):
  """Eight images with two questions each, and settings with which a run memorizes them."""

  def __init__(self, tokenizer):
    self.tokenizer = tokenizer
    self.config = c = tiny_run.config(
      **tiny_run.NO_DROPOUT,
      data__questions_per_image=2,
      data__augment__flip=0.0,
      optim__schedule__name="constant",
      optim__lr=3e-3,
      optim__visual_lr=3e-3,
      optim__b2=0.95,
      optim__clip=0.0,
      optim__weight_decay=0.0,
      model__initializer_range=0.1,
    )
    source = vqa.get(c.data, "train")
    records = [
      {**source[i], "questions": [q for q in source[i]["questions"] if "what" in q["question"]][:2]}
      for i in range(40)
    ]
    self.records = [r for r in records if r["questions"]][:8]
    transform = data.make_transform(c, tokenizer, train=False)
    examples = [transform(i, r, None) | {"mask": np.True_} for i, r in enumerate(self.records)]
    self.batch = {k: np.stack([e[k] for e in examples]) for k in examples[0]}
    self.built = loop.build(c, tokenizer, 1000, 1000, jax.devices()[:1])


@pytest.fixture(scope="module")
def learner(tokenizer):
  return Learner(tokenizer)


def test_four_microbatches_equal_one_with_uneven_counts(learner):
  """On a mesh too: every microbatch takes rows from every device.

  The gradients of the whole batch are those of the train step: after its first update the first
  moment of Adam is 1 - b1 times the gradient.
  """
  batch = learner.batch | {"question_valid": np.ones((8, 2), bool)}
  batch["question_valid"][[0, 1, 2, 4, 5], 1] = False
  weights = np.linspace(0.25, 1.0, 8, dtype=np.float32)[:, None, None]
  batch["answer_weight"] = batch["question_valid"][..., None] * weights
  learner.state = random_state.host_state(learner.built, 0.1)
  parts, parts_loss, parts_metrics = learner.gradients((2, 1, 1), parts=4, batch=batch)
  state, metrics, _ = jax.device_get(
    learner.built.train_step(learner.place(), batch, jnp.bool_(True))
  )
  scale = 1 / (1 - learner.config.optim.b1)
  whole = {name: scale * x for name, x in tiny_run.flat(state.opt_state.mu).items()}
  assert float(parts_loss) == pytest.approx(float(metrics["loss"][0]), rel=1e-5)
  tiny_run.assert_gradients_equal(tiny_run.flat(parts), whole, 1e-5)
  for name in ("loss_answer", "token_accuracy"):
    np.testing.assert_allclose(parts_metrics[name], metrics[name], rtol=1e-5, err_msg=name)


def test_eight_images_are_memorized(learner, tokenizer):
  """Without dropout the loss goes to zero, and generation gives each image's trained answers."""
  batch, built, stddev = learner.batch, learner.built, learner.config.model.initializer_range
  state = random_state.overfit(built, batch, stddev, 400)
  out = built.predict["generate"](state.params, batch)
  said = {
    (q["question_id"], tokenizer.decode(out["tokens"][row, i, : out["length"][row, i]]))
    for row, r in enumerate(learner.records)
    for i, q in enumerate(r["questions"])
  }
  truth = {(q["question_id"], q["answers"][0]) for r in learner.records for q in r["questions"]}
  assert len({answer for _, answer in truth}) >= 4
  assert said == truth
