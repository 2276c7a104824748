"""Image-text contrastive learning with a momentum teacher and queues of its features (paper section 3.3).

Shapes: B images and their texts, over the global batch; Q queue columns; E feature width. Features are unit vectors.
"""

import jax
import jax.numpy as jnp

NO_ID = -100  # of a queue column that no image has filled; ids of images are 0 or more
TEMPERATURE_RANGE = (0.001, 0.5)


def init_queues(width, size):
  """Queues of random unit vectors, which match no image: {"image_queue", "text_queue": f32[E, Q], "idx_queue": i32[1, Q],
  "queue_ptr": i32[1]}, under the names that converted checkpoints have."""
  def unit(key):
    x = jax.random.normal(key, (width, size))
    return x / jnp.linalg.norm(x, axis=0)

  image, text = jax.random.split(jax.random.key(0))
  return {"image_queue": unit(image), "text_queue": unit(text), "idx_queue": jnp.full((1, size), NO_ID, jnp.int32),
          "queue_ptr": jnp.zeros((1,), jnp.int32)}


def enqueue(queues, image, text, ids, valid):
  """Overwrites the columns from the pointer on, around the end, with the teacher's features, in the order of the batch.

  Args:
    image, text: f32[B, E]. ids: i32[B]. valid: bool[B]; other rows leave a column of zeros that matches no image.
  """
  size = queues["image_queue"].shape[1]
  kept = min(len(ids), size)  # a batch larger than the queue leaves its last rows
  start = queues["queue_ptr"][0] + len(ids) - kept
  columns = (start + jnp.arange(kept)) % size
  image, text = (jnp.where(valid[:, None], x, 0.0)[-kept:].T for x in (image, text))
  ids = jnp.where(valid, ids, NO_ID)[-kept:]
  return {"image_queue": queues["image_queue"].at[:, columns].set(image), "text_queue": queues["text_queue"].at[:, columns].set(text),
          "idx_queue": queues["idx_queue"].at[0, columns].set(ids), "queue_ptr": (start[None] + kept) % size}


def targets(equal, teacher_similarities, alpha):
  """alpha x the teacher's softmax + (1 - alpha) x an equal share for every match.

  Args:
    equal: bool[B, C], which columns match a row; at least one does. teacher_similarities: f32[B, C]. alpha: f32[].

  Returns:
    f32[B, C], rows sum to 1.
  """
  matches = equal / equal.sum(1, keepdims=True)
  return alpha * jax.nn.softmax(teacher_similarities) + (1.0 - alpha) * matches


def contrastive_loss(similarities, targets):
  """Cross-entropy of every row over its columns. f32[B, C] twice -> f32[B]."""
  return -(targets * jax.nn.log_softmax(similarities)).sum(1)


def image_text_losses(image, text, teacher_image, teacher_text, ids, valid, queues, temperature, alpha, match="image"):
  """Both directions of the loss over the batch and the queues.

  Args:
    image, text, teacher_image, teacher_text: f32[B, E]; without a teacher, image and text again. ids: i32[B], of the images.
    queues: see `init_queues`; {}: the batch alone.
    valid: bool[B]; texts and images of other rows are no candidates of anyone.
    temperature: f32[], similarities are divided by it. alpha: f32[], weight of the teacher.
    match: "image": texts (images) with the same image id match, in the queue too; "row": each row's own alone, as the
      official pre-training (docs/official.md item 52).

  Returns:
    (f32[B] image to text, f32[B] text to image, {"i2t", "t2i": f32[B, B + Q] similarities}).

  Raises:
    ValueError: an unknown `match`.
  """
  if match not in ("image", "row"):
    raise ValueError(f"config.task.match={match!r} is not one of image, row.")
  queues = queues or init_queues(image.shape[1], 0)
  rows, size = len(ids), queues["idx_queue"].shape[1]
  own = jnp.eye(rows, rows + size, dtype=bool)
  candidates = jnp.concatenate([valid, jnp.ones((size,), bool)])
  equal = own | (ids[:, None] == jnp.concatenate([ids, queues["idx_queue"][0]])[None]) & candidates if match == "image" else own
  still = jax.lax.stop_gradient(temperature)

  def direction(features, teacher, others, queue):
    columns = jnp.concatenate([others.T, queue], axis=1)
    sims, soft = features @ columns / temperature, teacher @ columns / still
    hidden = jnp.where(candidates | own, 0.0, -1e9)  # a row is its own candidate always: finite, and without weight if not valid
    return contrastive_loss(sims + hidden, targets(equal, soft + hidden, alpha)), sims

  i2t, sims_i2t = direction(image, teacher_image, teacher_text, queues["text_queue"])
  t2i, sims_t2i = direction(text, teacher_text, teacher_image, queues["image_queue"])
  return i2t, t2i, {"i2t": sims_i2t, "t2i": sims_t2i}


def clamp_temperature(params):
  """Parameters with the temperature inside TEMPERATURE_RANGE (docs/official.md item 23)."""
  return params | {"temp": {"value": jnp.clip(params["temp"]["value"], *TEMPERATURE_RANGE)}}
