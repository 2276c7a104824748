"""Hard negatives for image-text matching: other rows of the batch that the features find similar (docs/official.md item 24).

A row's negative comes from its group, `group` consecutive rows of the global batch. The group is part of the loss, not of
the hardware, so every mesh draws the same ones. B rows, E feature width, g = group.
"""

import jax
import jax.numpy as jnp


def _allowed(ids, valid, group):
  """bool[B / g, g, g]: rows of a group that are valid and have another image id."""
  ids, valid = ids.reshape(-1, group), valid.reshape(-1, group)
  return (ids[:, :, None] != ids[:, None, :]) & valid[:, None, :] & valid[:, :, None]


def present(ids, valid, group):
  """bool[B]: whether a row has any negative to draw. ids: i32[B], of the images. valid: bool[B]."""
  return _allowed(ids, valid, group).any(-1).reshape(-1)


def draw(features, others, ids, valid, temperature, group, noise=None):
  """For every row another row of its group, with the probability of a softmax over the similarities.

  Args:
    features: f32[B, E]. others: f32[B, E], of what is drawn (the texts for an image). ids, valid: see `present`.
    temperature: f32[]. noise: f32[B, g] by `gumbel_noise`; None: the most similar one, the first of equals.

  Returns:
    i32[B], numbers inside the group; 0 where there is no negative, see `present`.
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


def gumbel_noise(key, rows, group):
  """f32[B, g], the same on every mesh."""
  return jax.random.gumbel(key, (rows, group))


def take(x, numbers, group):
  """Rows of x, [B, ...], by their numbers inside each row's group."""
  grouped = x.reshape((-1, group) + x.shape[1:])
  index = numbers.reshape((-1, group) + (1,) * (x.ndim - 1))
  return jnp.take_along_axis(grouped, index, axis=1).reshape(x.shape)


def check_group(group, rows, whole="config.batch_size"):
  """Raises ValueError unless groups of this size fill the `rows` that `whole` names."""
  if group < 2 or rows % group:
    raise ValueError(
      f"config.task.negatives.group={group} must be at least 2 and divide {whole}={rows}."
    )
