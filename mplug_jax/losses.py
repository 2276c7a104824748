"""Loss functions on logits, float32. R sequences, T positions, V vocabulary."""

import jax
import jax.numpy as jnp


def token_cross_entropy(logits, labels):
  """Negative log-likelihood of each label. f32[R, T, V], i32[R, T] -> f32[R, T]."""
  chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - chosen


def soft_cross_entropy(logits, teacher_logits, axis=-1):
  """Cross-entropy against a teacher's distribution over the vocabulary. f32[R, T, V] twice -> f32[R, T].

  Args:
    axis: of the student's softmax. -1 is the vocabulary; the released code normalises over the time axis 1 instead
      (docs/official.md item 7).
  """
  return -(jax.nn.softmax(teacher_logits, axis=-1) * jax.nn.log_softmax(logits, axis=axis)).sum(-1)


def answer_cross_entropy(logits, ids, pad_id, teacher_logits=None, alpha=0.0, axis=-1):
  """Sum over an answer's tokens of the next-token loss, pads ignored (docs/official.md item 8).

  Args:
    logits: f32[R, T, V]. ids: i32[R, T], [bos] answer [eos] pad...: position t predicts ids[:, t + 1].
    teacher_logits: f32[R, T, V] or None; with it the loss is (1 - alpha) x cross-entropy + alpha x distillation.

  Returns:
    f32[R].
  """
  labels, logits = ids[:, 1:], logits[:, :-1]
  loss = token_cross_entropy(logits, labels)
  if teacher_logits is not None:
    soft = soft_cross_entropy(logits, jax.lax.stop_gradient(teacher_logits[:, :-1]), axis)
    loss = (1.0 - alpha) * loss + alpha * soft
  return jnp.where(labels != pad_id, loss, 0.0).sum(-1)
