"""Hard negatives for image-text matching: similar rows of the batch (docs/official.md item 24).

The negative of a row comes from its group, `group` consecutive rows of the global batch. The group
is part of the loss, not of the hardware, so every mesh draws the same negatives.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PRNGKeyArray, Shaped

from mplug_jax.arrays import Array


def _allowed(ids, valid, group):
  """bool[B / group, group, group]: rows of a group that are valid and have another image id."""
  ids = ids.reshape(-1, group)
  valid = valid.reshape(-1, group)
  return (ids[:, :, None] != ids[:, None, :]) & valid[:, None, :] & valid[:, :, None]


def present(
  ids: Int[Array, " rows"], valid: Bool[Array, " rows"], group: int
) -> Bool[Array, " rows"]:
  """Returns whether each row has any negative.

  Args:
    ids: image ids.
    valid: rows that count.
    group: rows of a group.
  """
  return _allowed(ids, valid, group).any(-1).reshape(-1)


def draw(
  features: Float[Array, "rows width"],
  others: Float[Array, "rows width"],
  ids: Int[Array, " rows"],
  valid: Bool[Array, " rows"],
  temperature: float | Float[Array, ""],
  group: int,
  noise: Float[Array, "rows group"] | None = None,
) -> Int[Array, " rows"]:
  """Draws a negative for every row, with the softmax over similarities as probability.

  Args:
    features: unit vectors of the rows.
    others: unit vectors of the candidates (of the texts when `features` are of images).
    ids: image ids.
    valid: rows that count.
    temperature: similarities are divided by it.
    group: rows of a group.
    noise: from `gumbel_noise`; None: the most similar candidate, the first of equal ones.

  Returns:
    Indices inside the group; 0 for rows without a negative, see `present`.
  """
  x, y = (f.reshape(-1, group, f.shape[-1]) for f in (features, others))
  scores = jnp.einsum("gie,gje->gij", x, y) / temperature
  if noise is not None:
    scores += noise.reshape(scores.shape)
  return (
    jnp.where(_allowed(ids, valid, group), scores, -jnp.inf)
    .argmax(-1)
    .reshape(-1)
    .astype(jnp.int32)
  )


def gumbel_noise(key: PRNGKeyArray, rows: int, group: int) -> Float[Array, "{rows} {group}"]:
  """Returns noise for `draw`, the same on every mesh."""
  return jax.random.gumbel(key, (rows, group))


def take(
  x: Shaped[Array, "rows *rest"], numbers: Int[Array, " rows"], group: int
) -> Shaped[Array, "rows *rest"]:
  """Returns the rows of `x` with these indices inside each row's group."""
  grouped = x.reshape((-1, group) + x.shape[1:])
  index = numbers.reshape((-1, group) + (1,) * (x.ndim - 1))
  return jnp.take_along_axis(grouped, index, axis=1).reshape(x.shape)


def check_group(group: int, rows: int, whole: str = "config.batch_size") -> None:
  """Checks that groups of this size fill the rows.

  Args:
    group: rows of a group.
    rows: rows of the batch.
    whole: name of the setting with the number of rows, for the message.

  Raises:
    ValueError: the group has one row or does not divide the rows.
  """
  if group < 2 or rows % group:
    raise ValueError(
      f"config.task.negatives.group={group} must be at least 2 and divide {whole}={rows}."
    )
