"""Loss functions on logits, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from mplug_jax.arrays import Array


def token_cross_entropy(
  logits: Float[Array, "*positions vocabulary"], labels: Int[Array, "*positions"]
) -> Float[Array, "*positions"]:
  """Returns the negative log-likelihood of each label."""
  chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - chosen


def next_ids(ids: Int[Array, "rows length"]) -> Int[Array, "rows length"]:
  """Returns the id after each position, 0 after the last: the labels of a decoder."""
  return jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))


def vocabulary_losses(
  hidden: Float[Array, "rows length width"],
  table: Float[Array, "vocabulary width"],
  bias: Float[Array, " vocabulary"],
  labels: Int[Array, "rows length"],
  chunk: int = 0,
) -> tuple[Float[Array, "rows length"], Bool[Array, "rows length"]]:
  """Returns the cross-entropy over the vocabulary, computed from the decoder's output.

  With `chunk`, logits exist for only so many positions at a time in the forward and the backward
  pass, and are computed twice.

  Args:
    hidden: input of the output layer.
    table: word embeddings.
    bias: bias of the output layer, float32.
    labels: ids of the expected tokens.
    chunk: positions of all sequences at a time; 0: all.

  Returns:
    (negative log-likelihood of each label in float32, whether the label is the most probable word).
  """
  table = table.astype(hidden.dtype)

  def losses(hidden, labels, table, bias):
    logits = vocabulary_logits(hidden, table, bias)
    return token_cross_entropy(logits, labels), logits.argmax(-1) == labels

  length = labels.shape[1]
  if not 0 < chunk < length:
    return losses(hidden, labels, table, bias)
  parts = -(-length // chunk)

  def split(x):  # [R, T, ...] -> [parts, R, chunk, ...]: every part has rows of every device
    x = jnp.pad(x, ((0, 0), (0, parts * chunk - length)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape((len(x), parts, chunk) + x.shape[2:]).swapaxes(0, 1)

  remade = jax.checkpoint(losses)
  out = jax.lax.map(lambda part: remade(*part, table, bias), (split(hidden), split(labels)))
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(len(labels), -1)[:, :length], out)


def vocabulary_logits(
  hidden: Float[Array, "rows length width"],
  table: Float[Array, "vocabulary width"],
  bias: Float[Array, " vocabulary"],
) -> Float[Array, "rows length vocabulary"]:
  """Returns float32 logits; `hidden` and `table` have the same dtype."""
  return jnp.einsum("bld,vd->blv", hidden, table, preferred_element_type=jnp.float32) + bias


def soft_cross_entropy(
  logits: Float[Array, "rows length vocabulary"],
  teacher_logits: Float[Array, "rows length vocabulary"],
  axis: int = -1,
) -> Float[Array, "rows length"]:
  """Returns the cross-entropy against a teacher's distribution over the vocabulary.

  Args:
    logits: of the student.
    teacher_logits: of the teacher.
    axis: axis of the student's softmax. -1 is the vocabulary; the released code normalizes over
      the time axis 1 instead (docs/official.md item 7).
  """
  return -(jax.nn.softmax(teacher_logits, axis=-1) * jax.nn.log_softmax(logits, axis=axis)).sum(-1)


def distilled_cross_entropy(
  logits: Float[Array, "rows length vocabulary"],
  labels: Int[Array, "rows length"],
  teacher_logits: Float[Array, "rows length vocabulary"],
  alpha: float | Float[Array, ""],
  axis: int = -1,
) -> Float[Array, "rows length"]:
  """Returns (1 - alpha) x cross-entropy + alpha x cross-entropy against the teacher.

  Args:
    logits: of the student.
    labels: ids of the expected tokens.
    teacher_logits: of the teacher, which gets no gradient.
    alpha: weight of the teacher.
    axis: see `soft_cross_entropy`.
  """
  soft = soft_cross_entropy(logits, jax.lax.stop_gradient(teacher_logits), axis)
  return (1.0 - alpha) * token_cross_entropy(logits, labels) + alpha * soft


def answer_cross_entropy(
  logits: Float[Array, "rows length vocabulary"],
  ids: Int[Array, "rows length"],
  pad_id: int,
  teacher_logits: Float[Array, "rows length vocabulary"] | None = None,
  alpha: float | Float[Array, ""] = 0.0,
  axis: int = -1,
) -> Float[Array, " rows"]:
  """Returns the sum of the next-token loss over each answer (docs/official.md item 8).

  Args:
    logits: position t predicts ids[:, t + 1].
    ids: [bos] answer [eos] pad...
    pad_id: id of labels that do not count.
    teacher_logits: adds distillation, see `distilled_cross_entropy`; None: none.
    alpha: weight of the teacher.
    axis: see `soft_cross_entropy`.
  """
  labels = ids[:, 1:]
  logits = logits[:, :-1]
  if teacher_logits is None:
    loss = token_cross_entropy(logits, labels)
  else:
    loss = distilled_cross_entropy(logits, labels, teacher_logits[:, :-1], alpha, axis)
  return jnp.where(labels != pad_id, loss, 0.0).sum(-1)
