"""Ranking of given answers by the decoder's likelihood, in two stages (docs/official.md item 9)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from mplug_jax.arrays import Array


class Ranking(NamedTuple):
  """The most probable candidates of every row.

  Attributes:
    answers: candidate indices, most probable first.
    probabilities: among these candidates.
  """

  answers: Int[Array, "rows kept"]
  probabilities: Float[Array, "rows kept"]


def rank(
  score_fn: Callable[[Int[Array, "..."]], Float[Array, "..."]],
  rows: int,
  candidates: Int[Array, "candidates length"],
  *,
  top_k: int,
  pad_id: int,
  first_token_twice: bool = True,
) -> Ranking:
  """Ranks candidate answers for each of M memory rows.

  The k = min(top_k, candidates) candidates with the most probable first token are scored in full.
  Candidates with the same first token tie in that stage; the earlier one is taken first.

  Args:
    score_fn: i32[M, n, T] -> f32[M, n, T, V], logits under teacher forcing of n sequences a row.
    rows: number of memory rows M.
    candidates: [bos] answer [eos] pad...
    top_k: number of candidates scored in full.
    pad_id: id of tokens that do not count.
    first_token_twice: adds the first token's log-probability to a sum that includes it already, as
      the released code.
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
