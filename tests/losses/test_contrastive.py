"""Contrastive loss, queues and hard negatives against sums in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.losses import contrastive, hard_negatives


def unit(rng, *shape):
  x = rng.standard_normal(shape).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


# Their arguments are traced: cases that differ in values share one program.
losses = jax.jit(contrastive.image_text_losses, static_argnames=("match", "chunk"))


@pytest.fixture
def case():
  """Four rows and three queue columns: rows 0 and 2 are image 7, as column 1; row 3 is invalid."""
  rng = np.random.default_rng(0)
  features = {name: unit(rng, 4, 5) for name in ("image", "text", "teacher_image", "teacher_text")}
  queues = {
    "image_queue": unit(rng, 3, 5).T,
    "text_queue": unit(rng, 3, 5).T,
    "idx_queue": np.asarray([[contrastive.NO_ID, 7, 5]], np.int32),
    "queue_ptr": np.asarray([0], np.int32),
  }
  return features | {
    "ids": np.asarray([7, 8, 7, 9], np.int32),
    "valid": np.asarray([True, True, True, False]),
    "queues": queues,
  }


def by_hand(case, alpha, match, temperature=0.1):
  ids = np.concatenate([case["ids"], case["queues"]["idx_queue"][0]])
  valid = np.concatenate([case["valid"], np.ones(3, bool)])
  losses = []
  for student, teacher, others, queue in (
    ("image", "teacher_image", "teacher_text", "text_queue"),
    ("text", "teacher_text", "teacher_image", "image_queue"),
  ):
    columns = np.concatenate([np.asarray(case[others]).T, case["queues"][queue]], axis=1).astype(
      np.float64
    )
    rows = []
    for i in range(3):
      logits, soft = (
        np.asarray(case[f], np.float64)[i] @ columns / temperature for f in (student, teacher)
      )
      p, q = (np.where(valid, np.exp(x), 0) for x in (logits, soft))
      same = (ids == ids[i]) & valid if match == "image" else np.arange(7) == i
      target = alpha * q / q.sum() + (1 - alpha) * same / same.sum()
      rows.append(-(target[valid] * np.log(p[valid] / p.sum())).sum())
    losses.append(rows)
  return losses


@pytest.mark.parametrize("match", ["image", "row"])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_contrastive_loss_of_valid_rows_equals_numpy(case, alpha, match):
  i2t, t2i, best = losses(**case, temperature=0.1, alpha=alpha, match=match)
  for ours, expected in zip((i2t, t2i), by_hand(case, alpha, match)):
    np.testing.assert_allclose(ours[:3], expected, rtol=1e-5)
  assert np.isfinite(i2t).all()
  assert np.isfinite(t2i).all()
  columns = [case["teacher_image"].T, case["queues"]["image_queue"]]
  sims = case["text"] @ np.concatenate(columns, axis=1)
  np.testing.assert_array_equal(
    best["t2i"][:3], np.delete(sims, 3, 1).argmax(1)[:3] + (np.delete(sims, 3, 1).argmax(1)[:3] > 2)
  )
  with pytest.raises(ValueError, match="config.task.match='caption'"):
    contrastive.image_text_losses(**case, temperature=0.1, alpha=alpha, match="caption")


@functools.partial(jax.jit, static_argnames=("queue", "match", "chunk"))
def losses_and_gradients(changing, case, queue, match, chunk):
  """Gradients of a weighted sum, losses and columns; without a queue both sides learn."""

  def loss(changing):
    arguments = case | changing
    if not queue:
      arguments |= {"teacher_image": arguments["image"], "teacher_text": arguments["text"]}
    i2t, t2i, best = contrastive.image_text_losses(
      **arguments, alpha=0.4 * queue, match=match, chunk=chunk
    )
    return (i2t * jnp.arange(4) + t2i).sum(), (i2t, t2i, best)

  return jax.value_and_grad(loss, has_aux=True)(changing)


@pytest.mark.parametrize(
  ("match", "queue", "chunk"),
  [
    *(("image", True, chunk) for chunk in (2, 3, 100)),
    *(("row", True, chunk) for chunk in (2, 3)),
    ("image", False, 3),
  ],
)
def test_chunks_of_columns_do_not_change_the_loss(case, chunk, match, queue):
  """Losses, columns and gradients; 3 is no divisor of the rows and 2 none of the queue."""
  case = case if queue else case | {"queues": {}}
  changing = {"image": case["image"], "text": case["text"], "temperature": np.float32(0.1)}
  whole, chunked = (losses_and_gradients(changing, case, queue, match, size) for size in (0, chunk))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6 * np.abs(y).max()),
    chunked,
    whole,
  )


def test_invalid_rows_do_not_change_the_loss_of_other_rows(case):
  changed = case | {"teacher_text": case["teacher_text"].copy(), "ids": case["ids"].copy()}
  changed["teacher_text"][3], changed["ids"][3] = case["text"][0], 7
  for x, y in zip(*(losses(**c, temperature=0.1, alpha=0.4)[:2] for c in (case, changed))):
    np.testing.assert_array_equal(x[:3], y[:3])


def test_student_and_temperature_get_gradients_but_targets_do_not(case):
  def loss(temperature, student):
    return contrastive.image_text_losses(
      **case | {"image": student}, temperature=temperature, alpha=0.4
    )[0][:3].mean()

  columns = np.concatenate([case["teacher_text"].T, case["queues"]["text_queue"]], axis=1)
  hidden = np.where(np.arange(7) == 3, np.float32(-1e9), np.float32(0.0))
  equal = np.asarray([[7, 8, 7, -1, contrastive.NO_ID, 7, 5]]) == np.asarray([[7, 8, 7, 9]]).T
  equal[3, 3] = True

  def with_fixed_targets(temperature):
    sims = contrastive.similarities(
      case["image"], case["teacher_text"], case["queues"]["text_queue"], 0.1
    )
    fixed = contrastive.targets(equal, case["teacher_image"] @ columns / 0.1 + hidden, 0.4)
    return contrastive.contrastive_loss(sims * 0.1 / temperature + hidden, fixed)[:3].mean()

  temperature, student = jax.jit(jax.grad(loss, argnums=(0, 1)))(0.1, case["image"])
  expected = jax.jit(jax.grad(with_fixed_targets))(0.1)
  np.testing.assert_allclose(temperature, expected, rtol=1e-5)
  assert np.abs(student[:3]).min() > 0


def test_queues_wrap_for_batches_of_any_size():
  rng = np.random.default_rng(1)
  queues, size = jax.device_get(jax.jit(contrastive.init_queues, static_argnums=(0, 1))(5, 7)), 7
  np.testing.assert_allclose(np.linalg.norm(queues["text_queue"], axis=0), 1, rtol=1e-6)
  assert (queues["idx_queue"] == contrastive.NO_ID).all()
  image, ids, at = np.array(queues["image_queue"]), np.array(queues["idx_queue"][0]), 0
  for count in (3, 5, 4, 7, 10):
    features, new = unit(rng, 2, count, 5), rng.integers(0, 100, count)
    valid = rng.random(count) < 0.8
    queues = jax.device_get(jax.jit(contrastive.enqueue)(queues, *features, new, valid))
    for i in range(count):
      image[:, at], ids[at] = (features[0, i], new[i]) if valid[i] else (0, contrastive.NO_ID)
      at = (at + 1) % size
    np.testing.assert_array_equal(queues["image_queue"], image)
    np.testing.assert_array_equal(queues["idx_queue"][0], ids)
    assert int(queues["queue_ptr"][0]) == at


def test_hard_negatives_are_other_images_drawn_by_similarity():
  rng = np.random.default_rng(2)
  ids = np.asarray([1, 1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 8])
  valid = np.asarray([True] * 10 + [False, True])
  x, y = unit(rng, 12, 3), unit(rng, 12, 3)

  @jax.jit
  def run(keys):
    drawn = jax.vmap(
      lambda key: hard_negatives.draw(
        x, y, ids, valid, 0.5, 4, hard_negatives.gumbel_noise(key, 12, 4)
      )
    )(keys)
    return (
      hard_negatives.present(ids, valid, 4),
      drawn,
      hard_negatives.take(jnp.arange(12), drawn[0], 4),
      hard_negatives.draw(x, y, ids, valid, 0.5, 4),
    )

  there, drawn, rows, hardest = jax.device_get(run(jax.random.split(jax.random.key(0), 4000)))
  np.testing.assert_array_equal(there, [True] * 4 + [False] * 4 + [True] * 2 + [False, True])
  for i in np.flatnonzero(there):
    group = np.arange(i // 4 * 4, i // 4 * 4 + 4)
    weights = np.where((ids[group] != ids[i]) & valid[group], np.exp(x[i] @ y[group].T / 0.5), 0)
    shares = np.bincount(drawn[:, i], minlength=4) / 4000
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.035)
    assert weights[hardest[i]] == weights.max()
    assert rows[i] == group[drawn[0, i]]
    assert ids[rows[i]] != ids[i]


def test_group_that_does_not_divide_the_batch_raises():
  hard_negatives.check_group(4, 12)
  for group in (1, 5, 24):
    with pytest.raises(
      ValueError,
      match=f"config.task.negatives.group={group} must be at least 2 and divide "
      f"config.batch_size=12",
    ):
      hard_negatives.check_group(group, 12)
