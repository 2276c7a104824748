"""Image-text contrastive loss with a momentum teacher and feature queues (paper section 3.3).

Rows are the images, and their texts, of the global batch. Features are unit vectors.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from mplug_jax.arrays import Array

Queues = dict[str, Shaped[Array, "..."]]  # see `init_queues`

NO_ID = -100  # of a queue column that no image has filled; ids of images are 0 or more
_HIDDEN = -1e9  # added to the similarity of a column that is no candidate
TEMPERATURE_RANGE = (0.001, 0.5)


def init_queues(width: int, size: int) -> Queues:
  """Returns queues of random unit vectors, which match no image.

  Args:
    width: width E of the features.
    size: number of columns Q.

  Returns:
    {"image_queue", "text_queue": f32[E, Q], "idx_queue": i32[1, Q], "queue_ptr": i32[1]}, the
    names in converted checkpoints.
  """

  def unit(key):
    x = jax.random.normal(key, (width, size))
    return x / jnp.linalg.norm(x, axis=0)

  image, text = jax.random.split(jax.random.key(0))
  return {
    "image_queue": unit(image),
    "text_queue": unit(text),
    "idx_queue": jnp.full((1, size), NO_ID, jnp.int32),
    "queue_ptr": jnp.zeros((1,), jnp.int32),
  }


def enqueue(
  queues: Queues,
  image: Float[Array, "rows width"],
  text: Float[Array, "rows width"],
  ids: Int[Array, " rows"],
  valid: Bool[Array, " rows"],
) -> Queues:
  """Returns the queues with the columns after the pointer overwritten, wrapping around.

  Args:
    queues: see `init_queues`.
    image: features of the teacher.
    text: features of the teacher.
    ids: image ids.
    valid: rows that count; the others leave a column of zeros that matches no image.
  """
  size = queues["image_queue"].shape[1]
  kept = min(len(ids), size)  # a batch larger than the queue leaves its last rows
  start = queues["queue_ptr"][0] + len(ids) - kept
  columns = (start + jnp.arange(kept)) % size
  image, text = (jnp.where(valid[:, None], x, 0.0)[-kept:].T for x in (image, text))
  ids = jnp.where(valid, ids, NO_ID)[-kept:]
  return {
    "image_queue": queues["image_queue"].at[:, columns].set(image),
    "text_queue": queues["text_queue"].at[:, columns].set(text),
    "idx_queue": queues["idx_queue"].at[0, columns].set(ids),
    "queue_ptr": (start[None] + kept) % size,
  }


def targets(
  equal: Bool[Array, "rows columns"],
  teacher_similarities: Float[Array, "rows columns"],
  alpha: float | Float[Array, ""],
) -> Float[Array, "rows columns"]:
  """Returns alpha x the teacher's softmax + (1 - alpha) x an equal share for every match.

  Args:
    equal: columns that match a row, at least one each.
    teacher_similarities: of the teacher.
    alpha: weight of the teacher.

  Returns:
    Target probabilities; rows sum to 1.
  """
  matches = equal / equal.sum(1, keepdims=True)
  return alpha * jax.nn.softmax(teacher_similarities) + (1.0 - alpha) * matches


def contrastive_loss(
  similarities: Float[Array, "rows columns"], targets: Float[Array, "rows columns"]
) -> Float[Array, " rows"]:
  """Returns the cross-entropy of every row over its columns."""
  return -(targets * jax.nn.log_softmax(similarities)).sum(1)


def similarities(
  features: Float[Array, "rows width"],
  others: Float[Array, "others width"],
  queue: Float[Array, "width size"],
  temperature: float | Float[Array, ""],
) -> Float[Array, "rows others+size"]:
  """Returns similarities with the other side of the batch, then with the queue."""
  return features @ jnp.concatenate([others.T, queue], axis=1) / temperature


def image_text_losses(
  image: Float[Array, "rows width"],
  text: Float[Array, "rows width"],
  teacher_image: Float[Array, "rows width"],
  teacher_text: Float[Array, "rows width"],
  ids: Int[Array, " rows"],
  valid: Bool[Array, " rows"],
  queues: Queues,
  temperature: float | Float[Array, ""],
  alpha: float | Float[Array, ""],
  match: str = "image",
  chunk: int = 0,
) -> tuple[Float[Array, " rows"], Float[Array, " rows"], dict[str, Int[Array, " rows"]]]:
  """Returns both directions of the loss over the batch and the queues.

  With `chunk`, similarities exist for only so many columns at a time in the forward and the
  backward pass, and are computed twice.

  Args:
    image: features of the student.
    text: features of the student.
    teacher_image: features of the teacher; without a teacher `image` again, and alpha 0.
    teacher_text: features of the teacher; without a teacher `text` again, and alpha 0.
    ids: image ids.
    valid: rows that count; the others are no candidates of any row.
    queues: see `init_queues`; {}: only the batch.
    temperature: similarities are divided by it.
    alpha: weight of the teacher.
    match: "image": texts (images) with the same image id match, in the queue too; "row": only the
      row's own, as the official pre-training (docs/official.md item 52).
    chunk: columns at a time; 0: all.

  Returns:
    (loss image to text, loss text to image, {"i2t", "t2i": index of the most similar of the
    batch's and the queue's columns}).

  Raises:
    ValueError: `match` is unknown.
  """
  if match not in ("image", "row"):
    raise ValueError(f"config.task.match={match!r} is not one of image, row.")
  queues = queues or init_queues(image.shape[1], 0)
  columns = _candidate_columns(ids, valid, queues["idx_queue"][0], match)
  if chunk:
    direction = functools.partial(_chunked_direction, columns, temperature, alpha, chunk)
  else:
    direction = functools.partial(_direction, columns, temperature, alpha)
  i2t, best_text = direction(image, teacher_image, teacher_text, queues["text_queue"])
  t2i, best_image = direction(text, teacher_text, teacher_image, queues["image_queue"])
  return i2t, t2i, {"i2t": best_text, "t2i": best_image}


def _candidate_columns(ids, valid, queue_ids, match):
  """Matches and candidates among the columns: the rows of the batch, then the queue.

  Args:
    ids: i32[B].
    valid: bool[B].
    queue_ids: i32[Q].
    match: see `image_text_losses`.

  Returns:
    Function (start, count) -> (bool[B, count] columns from `start` on that match each row,
    bool[B, count] those that are candidates). A row always matches itself.
  """
  candidates = jnp.concatenate([valid, jnp.ones(queue_ids.shape, bool)])
  column_ids = jnp.concatenate([ids, queue_ids])

  def columns(start, count):
    same_row = jnp.arange(len(ids))[:, None] == start + jnp.arange(count)
    is_candidate = jax.lax.dynamic_slice_in_dim(candidates, start, count)
    counted = is_candidate | same_row
    if match == "row":
      return same_row, counted
    same_image = ids[:, None] == jax.lax.dynamic_slice_in_dim(column_ids, start, count)
    return same_row | (same_image & is_candidate), counted

  return columns


def _direction(columns, temperature, alpha, features, teacher, others, queue):
  """(f32[B] loss, i32[B] most similar column) of one direction."""
  sims = similarities(features, others, queue, temperature)
  soft = jax.lax.stop_gradient(similarities(teacher, others, queue, temperature))
  equal, counted = columns(0, sims.shape[1])
  # A row is always its own candidate: its loss is finite, and has no weight if it is not valid.
  hidden = jnp.where(counted, 0.0, _HIDDEN)
  return contrastive_loss(sims + hidden, targets(equal, soft + hidden, alpha)), (
    sims + hidden
  ).argmax(1)


def _chunked_direction(columns, temperature, alpha, chunk, features, teacher, others, queue):
  """As `_direction`, chunk by chunk.

  The loss sums logsumexp(s) - alpha softmax(t) s - (1 - alpha) s_equal / matches over columns.
  """
  rows = len(features)
  none = jnp.full((rows,), -jnp.inf)
  zero = jnp.zeros((rows,))
  carry = {
    "student": (none, zero),
    "teacher": (none, zero, zero),
    "matches": (zero, zero),
    "best": (none, zero.astype(jnp.int32)),
  }
  for first, table in ((0, others.T), (rows, queue)):  # apart, for the queue has no gradient
    if table.shape[1]:
      carry = _scan_columns(
        columns, temperature, min(chunk, table.shape[1]), features, teacher, table, first, carry
      )
  (top, total), (_, soft_total, soft_sum), (count, equal_sum) = (
    carry["student"],
    carry["teacher"],
    carry["matches"],
  )
  return top + jnp.log(total) - alpha * soft_sum / soft_total - (
    1.0 - alpha
  ) * equal_sum / count, carry["best"][1]


def _scan_columns(columns, temperature, chunk, features, teacher, table, first, carry):
  """Adds the sums over the columns `table` f32[E, C], with indices from `first` on, to `carry`."""
  width = table.shape[1]

  @jax.checkpoint
  def add(carry, wanted):
    # The last chunk begins among columns that are counted already.
    start = jnp.minimum(wanted, width - chunk)
    part = jax.lax.dynamic_slice_in_dim(table, start, chunk, axis=1)
    equal, counted = columns(first + start, chunk)
    new = start + jnp.arange(chunk) >= wanted
    hidden = jnp.where(counted & new, 0.0, _HIDDEN)
    sims = features @ part / temperature
    soft = jax.lax.stop_gradient(teacher @ part / temperature) + hidden
    shown = jax.lax.stop_gradient(sims) + hidden

    top, total = carry["student"]
    higher = jnp.maximum(top, shown.max(1))
    student = (
      higher,
      total * jnp.exp(top - higher) + jnp.exp(sims + hidden - higher[:, None]).sum(1),
    )
    top, total, weighed = carry["teacher"]
    higher = jnp.maximum(top, soft.max(1))
    shrunk = jnp.exp(top - higher)
    weight = jnp.exp(soft - higher[:, None])
    taught = higher, total * shrunk + weight.sum(1), weighed * shrunk + (weight * sims).sum(1)
    equal = equal & new
    count, equal_sum = carry["matches"]
    matches = count + equal.sum(1), equal_sum + jnp.where(equal, sims, 0.0).sum(1)
    best, column = carry["best"]
    largest = shown.max(1)
    best = (
      jnp.maximum(best, largest),
      jnp.where(largest > best, first + start + shown.argmax(1).astype(jnp.int32), column),
    )
    return {"student": student, "teacher": taught, "matches": matches, "best": best}, None

  return jax.lax.scan(add, carry, jnp.arange(0, width, chunk))[0]


def clamp_temperature(params: dict[str, Any]) -> dict[str, Any]:
  """Returns the parameters with the temperature in TEMPERATURE_RANGE (docs/official.md item 23)."""
  return params | {"temp": {"value": jnp.clip(params["temp"]["value"], *TEMPERATURE_RANGE)}}
