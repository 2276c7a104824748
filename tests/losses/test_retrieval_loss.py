"""The retrieval loss against sums written out in numpy, on meshes, with rows that do not count.

And that it learns.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.losses import contrastive
from mplug_jax.models.factory import build_model
from mplug_jax.parallel import batches
from mplug_jax.tasks import retrieval
from mplug_jax.training.build import build_for_evaluation
from tests.support import mesh_case, random_state, retrieval_files, tiny_run
from tests.support import retrieval_by_hand as by_hand


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return retrieval_files.write(tmp_path_factory.mktemp("retrieval"))


class Case(mesh_case.MeshCase):
  """The tiny task: one state and batch, and a compiled gradient function for each mesh."""

  reference = (8, 1, 1)  # devices of the results that others are compared with

  def __init__(self, folder, **changes):
    self.config, self.tokenizer = (
      retrieval_files.steady_config(folder, **changes),
      retrieval_files.tokenizer(folder),
    )
    self.batch = retrieval_files.first_batch(self.config, self.tokenizer)
    self.batch["id"][5] = self.batch["id"][4]  # two captions of one image
    self.batch["corrupt"][2], self.batch["image"][2] = True, 0
    self.built = build_for_evaluation(self.config, self.tokenizer, jax.devices()[:1])
    self.task = self.built.task
    self.encoded = jax.jit(self._encoded)
    self.match_logits = jax.jit(
      lambda params, text, mask, image: self.task.apply(
        params, lambda m: m.match_logits(m.fuse(text, mask, image)[1])
      )
    )
    state = random_state.host_state(self.built, self.config.model.initializer_range)
    rng = np.random.default_rng(0)
    teacher = jax.tree.map(
      lambda x: x + rng.normal(0, 0.02, x.shape).astype(x.dtype), state.params
    )  # unlike the student
    queues = state.extra | {
      "idx_queue": rng.integers(0, 8, (1, 12)).astype(np.int32),
      "queue_ptr": np.array([7], np.int32),
    }
    self.state = state.replace(
      opt_state=(),
      ema_params=teacher,
      extra=queues,
      step=np.int32(1),
    )

  def _encoded(self, params, images, captions, image_slopes, text_slopes):
    """-> (((image tokens, features), (text tokens, mask, features)), gradient).

    The gradient is that of the sum of features x slopes, by the parameters.
    """

    def total(params):
      batch = {"image": images, "caption": captions}
      out = image, text = self.task.apply(params, self.task.encode, batch)
      return (image[1] * image_slopes).sum() + (text[2] * text_slopes).sum(), out

    gradient, out = jax.grad(total, has_aux=True)(params)
    return out, gradient

  def encode(self, params, batch=None, slopes=None):
    """Images and texts of a batch of eight, by default that of the case, and see `_encoded`."""
    batch = self.batch if batch is None else batch
    slopes = np.zeros((2, 8, self.task.model.embed_dim), np.float32) if slopes is None else slopes
    return jax.device_get(self.encoded(params, batch["image"], batch["caption"], *slopes))

  def features(self, params):
    """Features of the images and of the texts of the batch, in double precision."""
    (image, text), _ = self.encode(params)
    return image[1].astype(np.float64), text[2].astype(np.float64)

  def results(self, shape=reference, parts=1, **changed):
    """-> (gradients {path: array}, loss, {metric: (sum, count)}, extra), in so many microbatches.

    `changed` are arrays of the batch.
    """
    gradients, *rest = self.gradients_and_extra(shape, parts, self.batch | changed)
    return tiny_run.flat(gradients), *rest


@pytest.fixture(scope="module")
def case(folder):
  return Case(folder)


@pytest.fixture(scope="module")
def reference(case):
  """Results of one pass on eight devices; the formulas say what its loss must be."""
  return case.results()


def test_batch_spec_matches_the_transform(case):
  spec = case.task.batch_spec(8)
  assert {name: (x.shape, x.dtype) for name, x in case.batch.items()} == {
    name: (x.shape, x.dtype) for name, x in spec.items()
  }


def test_loss_equals_float64_formulas(case, reference):
  """Both terms, in double precision, with every pair of the matching term fused alone."""
  _, loss, metrics, _ = reference
  key = jax.random.fold_in(jax.random.fold_in(case.rng, 1), 0)
  itc, given = by_hand.contrast(
    case, jax.device_get(by_hand.noises_of(jax.random.split(key, 3)[1]))
  )
  itm, pairs = by_hand.match(case, given)
  np.testing.assert_allclose(metrics["loss_itc"], (itc, 7), rtol=1e-5)
  np.testing.assert_allclose(metrics["loss_itm"], (itm, pairs), rtol=1e-5)
  assert pairs == 7 + 2 * 7
  assert loss == pytest.approx(itc / 7 + itm / pairs, rel=1e-5)
  assert metrics["itm_accuracy"][1] == pairs
  assert metrics["corrupt_images"][0] == 1


def test_half_hard_negatives_are_those_of_float64_formulas(case, folder):
  """Half-way to hard negatives, at step 1 of a ramp of 2.

  The matching term reads nothing of the ramp but the negatives.
  """
  c = retrieval_files.steady_config(folder, task__negatives__ramp_steps=2)
  task = retrieval.RetrievalTask(build_model(c, case.tokenizer), c, case.tokenizer)
  state, key, names = case.state, jax.random.split(jax.random.key(3), 3)[1], ("image", "text")
  features = {
    prefix + name: x.astype(np.float32)
    for prefix, params in (("", state.params), ("teacher_", state.ema_params))
    for name, x in zip(names, case.features(params))
  }
  (terms, _, _, drawn), normalizers = jax.device_get(
    jax.jit(
      lambda *args: (task.compare(*args), task.loss_normalizers(args[3], args[4])),
    )(state.params, state, features, case.batch, key)
  )
  noises = jax.device_get(by_hand.noises_of(key))
  itc, given = by_hand.contrast(case, noises, 0.5)
  assert given != by_hand.contrast(case, noises, 1.0)[1]
  assert given == {(side, i): drawn[names[1 - side]][i] + i // 4 * 4 for side, i in given}
  np.testing.assert_allclose(terms["itc"], itc, rtol=1e-5)
  assert normalizers == {"itc": 7, "itm": 7 + len(given)}
  assert len(given) == 2 * 7


def test_teacher_features_enter_the_queues_in_batch_order(case, reference):
  queues = reference[3]
  image, text = case.features(case.state.ema_params)
  columns = [(7 + i) % 12 for i in range(8)]
  valid = ~case.batch["corrupt"]
  for name, teacher in (("image_queue", image), ("text_queue", text)):
    np.testing.assert_allclose(
      queues[name][:, columns].T, np.where(valid[:, None], teacher, 0), atol=1e-5
    )
    np.testing.assert_array_equal(
      np.delete(queues[name], columns, 1), np.delete(case.state.extra[name], columns, 1)
    )
  np.testing.assert_array_equal(
    queues["idx_queue"][0, columns], np.where(valid, case.batch["id"], contrastive.NO_ID)
  )
  assert queues["queue_ptr"] == [3]


def test_reference_gradients_are_not_zero(reference):
  """No gradient but those that are zero by construction is near the floor of the comparison.

  A key bias moves all scores of a query.
  """
  assert not [
    name
    for name, g in reference[0].items()
    if np.abs(g).max() < 1e-5 and not name.endswith("key/bias")
  ]


@pytest.mark.parametrize(
  ("shape", "parts"),
  [
    ((2, 2, 2), 2),
    pytest.param((1, 1, 1), 1, marks=pytest.mark.slow),
    pytest.param((2, 2, 2), 1, marks=pytest.mark.slow),
    pytest.param((1, 1, 1), 2, marks=pytest.mark.slow),
  ],
)
def test_loss_gradients_and_queues_depend_on_no_mesh_or_microbatches(shape, parts, case, reference):
  """Groups of negatives lie across devices where there are eight.

  In two microbatches too: every term compares or reads what it does in
  one, with the negatives and the columns of the whole batch."""
  gradients, loss, metrics, queues = case.results(shape, parts)
  assert loss == pytest.approx(reference[1], rel=1e-5)
  tiny_run.assert_gradients_equal(gradients, reference[0], 1e-5 if parts > 1 else 1e-4)
  assert metrics.keys() == reference[2].keys()
  for name, pair in reference[2].items():
    np.testing.assert_allclose(metrics[name], pair, rtol=1e-5, err_msg=name)
  for name, x in reference[3].items():
    np.testing.assert_allclose(queues[name], x, atol=1e-5, err_msg=name)


def test_unreadable_image_does_not_change_the_loss(case, reference):
  caption, image = case.batch["caption"].copy(), case.batch["image"].copy()
  caption[2], image[2] = caption[0], image[0]
  gradients, loss, *_ = case.results(caption=caption, image=image)
  assert loss == pytest.approx(reference[1], rel=1e-6)
  tiny_run.assert_gradients_equal(gradients, reference[0])


@pytest.mark.parametrize(
  ("name", "changed"),
  [
    ("one caption for all", {"caption": lambda x: np.repeat(x[:1], 8, 0)}),
    (
      "one image for all",
      {"image": lambda x: np.full_like(x, 7), "id": lambda x: np.zeros_like(x)},
    ),
    ("constant images of their own", {"image": lambda x: np.full_like(x, 255)}),
    ("empty captions", {"caption": lambda x: np.where(np.arange(x.shape[1]) == 0, x, 0)}),
    ("no image that can be read", {"corrupt": lambda x: np.ones_like(x)}),
  ],
)
def test_degenerate_batches_give_finite_losses_and_gradients(name, changed, case):
  gradients, loss, metrics, queues = case.results(
    **{key: change(case.batch[key]) for key, change in changed.items()}
  )
  assert np.isfinite(loss)
  assert all(np.isfinite(x).all() for x in [*gradients.values(), *queues.values()])
  if name == "one image for all":
    assert metrics["loss_itm"][1] == 7  # nothing is a negative of anything
  if name == "no image that can be read":
    assert loss == 0
    assert not any(x.any() for x in gradients.values())


def test_batch_of_one_learns_from_the_queue(case, folder):
  c = retrieval_files.steady_config(
    folder, batch_size=1, eval__batch_size=1, task__negatives__group=0
  )
  task = retrieval.RetrievalTask(build_model(c, case.tokenizer), c, case.tokenizer)
  batch = retrieval_files.first_batch(c, case.tokenizer)
  state = case.state.replace(step=np.int32(0), extra=jax.device_get(task.init_extra()))
  eight = {name: np.repeat(x, 8, axis=0) for name, x in batch.items()}
  student, teacher = (
    jax.tree.map(lambda x: x[:1], case.encode(params, eight)[0])
    for params in (state.params, state.ema_params)
  )
  features = {
    prefix + name: x[-1]
    for prefix, encoded in (("", student), ("teacher_", teacher))
    for name, x in zip(("image", "text"), encoded)
  }

  @jax.jit
  def losses(params, state, features, encoded, batch, key):
    terms, _, _, drawn = task.compare(params, state, features, batch, key)
    others, _ = task.rest(params, state, encoded, drawn, batch, key)
    return terms | others, task.loss_normalizers(batch, key)

  terms, normalizers = jax.device_get(
    losses(state.params, state, features, student, batch, jax.random.key(0))
  )
  assert np.isfinite(terms["itm"])
  assert terms["itc"] > 0.1
  assert normalizers == {"itc": 1, "itm": 1}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"ema__decay": 0.0}, "Retrieval learns from a teacher: set config.ema.decay"),
    ({"ema__use": "eval"}, "config.ema.use=teacher or both"),
    (
      {"optim__accumulate": "mean_of_means"},
      "config.optim.accumulate='mean_of_means': the contrastive loss compares all rows",
    ),
    (
      {"optim__microbatches": 4},
      "negatives.group=4 must be at least 2 and divide config.batch_size / "
      "config.optim.microbatches=2",
    ),
    ({"task__queue": -1, "task__alpha": 0.0}, "config.task.queue=-1 must be at least 0"),
    (
      {"task__queue": 0},
      "config.task.alpha=0.4 weighs the targets of a teacher, and config.task.queue=0 has none",
    ),
    (
      {"task__negatives__group": 3},
      "config.task.negatives.group=3 must be at least 2 and divide config.batch_size=8",
    ),
    (
      {"task__negatives__ramp_steps": 5, "task__negatives__greedy": True},
      "config.task.negatives.ramp_steps=5 makes drawn",
    ),
    (
      {"task__rerank_similarity": "sum"},
      "rerank_similarity='sum' is not one of none, add, likelihood",
    ),
    ({"task__rerank_texts": 0}, "config.task.rerank_texts=0 must be at least 1"),
    ({"task__rerank_k": -1}, "config.task.rerank_k=-1 must not be negative"),
  ],
)
def test_invalid_config_values_raise(changes, message, folder):
  with pytest.raises(ValueError, match=message):
    retrieval_files.built(
      retrieval_files.steady_config(folder, **changes),
      retrieval_files.tokenizer(folder),
      jax.devices()[:1],
    )


def test_loss_without_queue_and_teacher_equals_clip(case, folder):
  """CLIP's loss: only the batch, gradients through both features of a pair, on any mesh."""
  c = retrieval_files.steady_config(folder, task__queue=0, task__alpha=0.0, ema__decay=0.0)
  batch = case.batch
  built = mesh_case.on_mesh(build_for_evaluation(c, case.tokenizer, jax.devices()[:1]), (2, 2, 2))
  host = random_state.host_state(built, 0.1)
  assert host.extra == {}
  assert not jax.tree.leaves(host.ema_params)
  expected, slopes, of_temperature = by_hand.clip(
    *case.features(host.params),
    float(host.params["temp"]["value"]),
    batch["id"],
    np.flatnonzero(~batch["corrupt"]),
  )
  expected_gradient = tiny_run.flat(case.encode(host.params, slopes=slopes.astype(np.float32))[1])
  assert expected_gradient["temp/value"] == 0
  expected_gradient["temp/value"] = np.float32(of_temperature)

  def loss(params, state, batch):
    keys = jax.random.split(jax.random.key(0))
    _, features = built.task.encode_rows(params, state, batch, keys[0])
    terms, _, extra, _ = built.task.compare(params, state, features, batch, keys[1])
    return terms["itc"] / built.task.loss_normalizers(batch, keys[0])["itc"], extra

  state = mesh_case.place(host.replace(rng=jax.random.key(0)), built.abstract)
  with jax.set_mesh(built.mesh):
    (value, extra), gradient = jax.device_get(
      jax.jit(jax.value_and_grad(loss, has_aux=True))(
        state.params, state, batches.put_batch(batch, built.mesh)
      )
    )
  assert extra == {}
  assert value == pytest.approx(expected, rel=1e-5)
  tiny_run.assert_gradients_equal(tiny_run.flat(gradient), expected_gradient)


def test_temperature_is_clamped_if_configured(folder):
  tokenizer = retrieval_files.tokenizer(folder)
  for clamp, expected in ((True, 0.5), (False, 0.7)):
    c = retrieval_files.steady_config(folder, task__clamp_temperature=clamp)
    task = retrieval.RetrievalTask(build_model(c, tokenizer), c, tokenizer)
    assert task.project({"temp": {"value": jnp.float32(0.7)}})["temp"]["value"] == jnp.float32(
      expected
    )
