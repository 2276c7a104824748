"""Loss functions on logits, float32. R sequences, T positions, V vocabulary."""

import jax
import jax.numpy as jnp


def token_cross_entropy(logits, labels):
  """Negative log-likelihood of each label. f32[R, T, V], i32[R, T] -> f32[R, T]."""
  chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - chosen


def next_ids(ids):
  """The id behind each, 0 behind the last: what a decoder is to predict. i32[R, T] -> i32[R, T]."""
  return jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))


def vocabulary_losses(hidden, table, bias, labels, chunk=0):
  """Cross-entropy over the vocabulary, from what the logits are made of.

  With `chunk` they exist for so many positions at a time, forwards and backwards, and are computed twice.

  Args:
    hidden: dtype[R, T, D]. table: f[V, D], word embeddings. bias: f32[V]. labels: i32[R, T].
    chunk: positions of all sequences at a time; 0: all.

  Returns:
    (negative log-likelihood of each label f32[R, T], whether it is the most probable word bool[R, T]).
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


def vocabulary_logits(hidden, table, bias):
  """dtype[B, L, D], [V, D] of the same dtype, f32[V] -> f32[B, L, V]."""
  return jnp.einsum("bld,vd->blv", hidden, table, preferred_element_type=jnp.float32) + bias


def soft_cross_entropy(logits, teacher_logits, axis=-1):
  """Cross-entropy against a teacher's distribution over the vocabulary. f32[R, T, V] twice -> f32[R, T].

  Args:
    axis: of the student's softmax. -1 is the vocabulary; the released code normalizes over the time axis 1 instead
      (docs/official.md item 7).
  """
  return -(jax.nn.softmax(teacher_logits, axis=-1) * jax.nn.log_softmax(logits, axis=axis)).sum(-1)


def distilled_cross_entropy(logits, labels, teacher_logits, alpha, axis=-1):
  """(1 - alpha) x cross-entropy + alpha x that against the teacher, which gets no gradient; arguments as of the two."""
  soft = soft_cross_entropy(logits, jax.lax.stop_gradient(teacher_logits), axis)
  return (1.0 - alpha) * token_cross_entropy(logits, labels) + alpha * soft


def answer_cross_entropy(logits, ids, pad_id, teacher_logits=None, alpha=0.0, axis=-1):
  """Sum over an answer's tokens of the next-token loss, pads ignored (docs/official.md item 8).

  Args:
    logits: f32[R, T, V]. ids: i32[R, T], [bos] answer [eos] pad...: position t predicts ids[:, t + 1].
    teacher_logits: f32[R, T, V] or None; with it see `distilled_cross_entropy`.

  Returns:
    f32[R].
  """
  labels, logits = ids[:, 1:], logits[:, :-1]
  if teacher_logits is None:
    loss = token_cross_entropy(logits, labels)
  else:
    loss = distilled_cross_entropy(logits, labels, teacher_logits[:, :-1], alpha, axis)
  return jnp.where(labels != pad_id, loss, 0.0).sum(-1)
