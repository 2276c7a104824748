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
from tests.support import mesh_case, random_state, retrieval_files, tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return retrieval_files.write(tmp_path_factory.mktemp("retrieval"))


class Case(mesh_case.MeshCase):
  """The tiny task: one state and batch, and a compiled gradient function for each mesh."""

  def __init__(self, folder, **changes):
    self.config, self.tokenizer = (
      retrieval_files.steady_config(folder, **changes),
      retrieval_files.tokenizer(folder),
    )
    self.batch = retrieval_files.first_batch(self.config, self.tokenizer)
    self.batch["id"][5] = self.batch["id"][4]  # two captions of one image
    self.batch["corrupt"][2], self.batch["image"][2] = True, 0
    self.built = retrieval_files.built(self.config, self.tokenizer, jax.devices()[:1])
    self.task = self.built.task
    self.features = jax.jit(lambda params, batch: features_of(self.task, params, batch))
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

  def results(self, shape=(1, 1, 1), parts=1, **changed):
    """-> (gradients {path: array}, loss, {metric: (sum, count)}, extra), in so many microbatches.

    `changed` are arrays of the batch.
    """
    gradients, *rest = self.gradients_and_extra(shape, parts, self.batch | changed)
    return tiny_run.flat(gradients), *rest


@pytest.fixture(scope="module")
def case(folder):
  return Case(folder)


@pytest.fixture(scope="module")
def one_device(case):
  return case.results()


def test_batch_spec_matches_the_transform(case):
  spec = case.task.batch_spec(8)
  assert {name: (x.shape, x.dtype) for name, x in case.batch.items()} == {
    name: (x.shape, x.dtype) for name, x in spec.items()
  }


def features_of(task, params, batch):
  """Image and text tokens, mask and features, of one model."""
  (image, image_feature), (text, mask, text_feature) = task.apply(params, task.encode, batch)
  return image, text, mask, image_feature, text_feature


def features(case, params):
  """As `features_of` for the batch of the case, the features in double precision."""
  *tokens, x, y = case.features(params, case.batch)
  return *tokens, np.asarray(x, np.float64), np.asarray(y, np.float64)


def by_hand(case, noises, hardness=1.0):
  """(itc, itm, pairs matched) of the case, row by row.

  Alpha is half of 0.4 at step 1 of a ramp of 2.
  """
  state = case.state
  image, text, mask, x, y = features(case, state.params)
  *_, x_teacher, y_teacher = features(case, state.ema_params)
  ids = np.concatenate([case.batch["id"], state.extra["idx_queue"][0]])
  counts = np.concatenate([~case.batch["corrupt"], np.ones(12, bool)])
  temperature, alpha, rows = (
    float(state.params["temp"]["value"]),
    0.2,
    np.flatnonzero(~case.batch["corrupt"]),
  )
  itc, given, sides = (
    [],
    {},
    ((x, x_teacher, y_teacher, "text_queue"), (y, y_teacher, x_teacher, "image_queue")),
  )
  for side, (student, teacher, others, queue) in enumerate(sides):
    columns = np.concatenate([others, state.extra[queue].T.astype(np.float64)])
    for i in rows:
      student_scores, teacher_scores = (
        np.where(counts, features[i] @ columns.T / temperature, -np.inf)
        for features in (student, teacher)
      )
      soft = np.exp(teacher_scores) / np.exp(teacher_scores).sum()
      same = (ids == ids[i]) & counts
      target = alpha * soft + (1 - alpha) * same / same.sum()
      log = student_scores - np.log(np.exp(student_scores).sum())
      itc.append(-(target[counts] * log[counts]).sum() / 2)
      # Hard negatives: the largest similarity plus noise among the four rows of the group that
      # count and show another image.
      group = range(i // 4 * 4, i // 4 * 4 + 4)
      allowed = [j for j in group if j in rows and ids[j] != ids[i]]
      if allowed:
        given[side, i] = max(
          allowed, key=lambda j: hardness * student_scores[j] + noises[side][i, j % 4]
        )
  pairs = [(i, i, 1) for i in rows] + [
    (i, j, 0) if side == 0 else (j, i, 0) for (side, i), j in given.items()
  ]
  images, texts, labels = map(np.array, zip(*pairs))
  logits = case.match_logits(state.params, text[texts], mask[texts], image[images])
  logits = np.asarray(logits, np.float64)
  itm = np.log(np.exp(logits).sum(1)) - logits[range(len(pairs)), labels]
  return np.sum(itc), itm.sum(), len(pairs)


def noises_of(key):
  """Noise of the negatives: (of a text for each image, of an image for each text), [8, 4] each."""
  image, text = (
    np.asarray(jax.random.gumbel(k, (8, 4))) for k in jax.random.split(jax.random.split(key, 3)[1])
  )
  return text, image


def test_loss_equals_float64_formulas(case, one_device):
  """Both terms, in double precision, with every pair of the matching term fused alone."""
  _, loss, metrics, _ = one_device
  key = jax.random.fold_in(jax.random.fold_in(case.rng, 1), 0)
  itc, itm, pairs = by_hand(case, noises_of(key))
  np.testing.assert_allclose(metrics["loss_itc"], (itc, 7), rtol=1e-5)
  np.testing.assert_allclose(metrics["loss_itm"], (itm, pairs), rtol=1e-5)
  assert pairs == 7 + 2 * 7
  assert loss == pytest.approx(itc / 7 + itm / pairs, rel=1e-5)
  assert metrics["itm_accuracy"][1] == pairs
  assert metrics["corrupt_images"][0] == 1


def test_half_hard_negatives_give_the_loss_of_float64_formulas(case, folder):
  """Half-way to hard negatives, at step 1 of a ramp of 2."""
  c = retrieval_files.steady_config(folder, task__negatives__ramp_steps=2)
  task = retrieval.RetrievalTask(build_model(c, case.tokenizer), c, case.tokenizer)
  key = jax.random.key(3)
  itc, itm, pairs = by_hand(case, noises_of(key), 0.5)
  assert abs(by_hand(case, noises_of(key), 1.0)[1] / itm - 1) > 1e-3  # other negatives
  terms = jax.jit(task.loss)(case.state.params, case.state, case.batch, key)[0]
  np.testing.assert_allclose(terms["itc"], itc, rtol=1e-5)
  np.testing.assert_allclose(terms["itm"], itm, rtol=1e-5)
  assert task.loss_normalizers(case.batch, key) == {"itc": 7, "itm": pairs}
  assert pairs == 7 + 2 * 7


def test_teacher_features_enter_the_queues_in_batch_order(case, one_device):
  queues = one_device[3]
  *_, image, text = features(case, case.state.ema_params)
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


def test_reference_gradients_are_not_zero(one_device):
  """No gradient but those that are zero by construction is near the floor of the comparison.

  A key bias moves all scores of a query.
  """
  assert not [
    name
    for name, g in one_device[0].items()
    if np.abs(g).max() < 1e-5 and not name.endswith("key/bias")
  ]


@pytest.mark.parametrize(
  ("shape", "parts"),
  [
    ((8, 1, 1), 1),
    ((2, 2, 2), 2),
    pytest.param((2, 2, 2), 1, marks=pytest.mark.slow),
    pytest.param((1, 1, 1), 2, marks=pytest.mark.slow),
  ],
)
def test_loss_gradients_and_queues_equal_those_of_one_device(shape, parts, case, one_device):
  """Groups of negatives lie across devices where there are eight.

  In two microbatches too: every term compares or reads what it does in
  one, with the negatives and the columns of the whole batch."""
  gradients, loss, metrics, queues = case.results(shape, parts)
  assert loss == pytest.approx(one_device[1], rel=1e-5)
  tiny_run.assert_gradients_equal(gradients, one_device[0], 1e-5 if parts > 1 else 1e-4)
  assert metrics.keys() == one_device[2].keys()
  for name, pair in one_device[2].items():
    np.testing.assert_allclose(metrics[name], pair, rtol=1e-5, err_msg=name)
  for name, x in one_device[3].items():
    np.testing.assert_allclose(queues[name], x, atol=1e-5, err_msg=name)


def test_unreadable_image_does_not_change_the_loss(case, one_device):
  caption, image = case.batch["caption"].copy(), case.batch["image"].copy()
  caption[2], image[2] = caption[0], image[0]
  gradients, loss, *_ = case.results(caption=caption, image=image)
  assert loss == pytest.approx(one_device[1], rel=1e-6)
  tiny_run.assert_gradients_equal(gradients, one_device[0])


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
  state, key = case.state.replace(step=np.int32(0), extra=task.init_extra()), jax.random.key(0)
  terms, _, _ = jax.jit(task.loss)(state.params, state, batch, key)
  assert np.isfinite(terms["itm"])
  assert terms["itc"] > 0.1
  assert task.loss_normalizers(batch, key) == {"itc": 1, "itm": 1}


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
    ({"task__queue": -1, "task__alpha": 0.0}, "config.task.queue=-1 must not be negative"),
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


def test_loss_without_queue_and_teacher_equals_clip(folder):
  """CLIP's loss: only the batch, gradients through both features of a pair, on any mesh."""
  c = retrieval_files.steady_config(folder, task__queue=0, task__alpha=0.0, ema__decay=0.0)
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = (2, 2, 2)
  tokenizer = retrieval_files.tokenizer(folder)
  batch = retrieval_files.first_batch(c, tokenizer)
  batch["id"][5], batch["corrupt"][2] = batch["id"][4], True
  counted = np.flatnonzero(~batch["corrupt"])
  same = jnp.asarray(batch["id"][counted][:, None] == batch["id"][counted])

  def by_hand(params, task):
    *_, x, y = features_of(
      task, params, {name: batch[name][counted] for name in ("image", "caption")}
    )
    scores, target = x @ y.T / params["temp"]["value"], same / same.sum(1, keepdims=True)
    return (
      -sum((jax.nn.log_softmax(s) * target).sum() for s in (scores, scores.T)) / 2 / len(counted)
    )

  def loss(params, state, batch, task):
    terms, _, extra = task.loss(params, state, batch, jax.random.key(0))
    return terms["itc"] / len(counted), extra

  built = retrieval_files.built(c, tokenizer, jax.devices())
  host = random_state.host_state(built, 0.1)
  assert host.extra == {}
  assert not jax.tree.leaves(host.ema_params)
  expected = jax.jit(jax.value_and_grad(by_hand), static_argnums=1)(host.params, built.task)
  state = mesh_case.place(host.replace(rng=jax.random.key(0)), built.abstract)
  with jax.set_mesh(built.mesh):
    gradients = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=3)
    (value, extra), gradient = gradients(
      state.params, state, batches.put_batch(batch, built.mesh), built.task
    )
  assert extra == {}
  assert float(value) == pytest.approx(float(expected[0]), rel=1e-5)
  tiny_run.assert_gradients_equal(tiny_run.flat(gradient), tiny_run.flat(expected[1]))


def test_temperature_is_clamped_if_configured(folder):
  tokenizer = retrieval_files.tokenizer(folder)
  for clamp, expected in ((True, 0.5), (False, 0.7)):
    c = retrieval_files.steady_config(folder, task__clamp_temperature=clamp)
    task = retrieval.RetrievalTask(build_model(c, tokenizer), c, tokenizer)
    assert task.project({"temp": {"value": jnp.float32(0.7)}})["temp"]["value"] == jnp.float32(
      expected
    )
