"""Choosing among given answers: the decoder's likelihood of each, in two stages (docs/official.md item 9)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Ranking(NamedTuple):
  """answers: i32[M, k], candidate numbers, most probable first. probabilities: f32[M, k], among the k."""

  answers: jax.Array
  probabilities: jax.Array


def rank(score_fn, rows, candidates, *, top_k, pad_id, first_token_twice=True):
  """Ranks candidate answers for each of M memory rows.

  The k = min(top_k, N) candidates with the most probable first token are scored whole. Candidates with the same first
  token tie in that stage, the one that comes first is taken first.

  Args:
    score_fn: i32[M, n, T] -> f32[M, n, T, V], logits under teacher forcing of n sequences a row.
    rows: M.
    candidates: i32[N, T], [bos] answer [eos] pad...
    top_k: candidates scored whole.
    pad_id: tokens that do not count.
    first_token_twice: the released code adds the first token's log-probability to a sum that holds it already.

  Returns:
    Ranking.
  """
  first = score_fn(jnp.broadcast_to(candidates[0, :1], (rows, 1, 1)))[:, 0, 0]  # [M, V]
  first = jnp.take(jax.nn.log_softmax(first), candidates[:, 1], axis=1)  # [M, N]
  first, chosen = jax.lax.top_k(first, min(top_k, candidates.shape[0]))  # [M, k]
  ids = candidates[chosen]  # [M, k, T]
  labels = ids[..., 1:]
  log_probs = jax.nn.log_softmax(score_fn(ids)[..., :-1, :])
  log_probs = jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
  score = jnp.where(labels != pad_id, log_probs, 0.0).sum(-1)
  if first_token_twice:
    score += first
  order = jnp.argsort(-score, axis=1, stable=True)
  return Ranking(
    jnp.take_along_axis(chosen, order, axis=1),
    jnp.take_along_axis(jax.nn.softmax(score, axis=1), order, axis=1),
  )
