"""Recorded beam searches: ids and lengths exactly, except in recorded near ties, and scores."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.decoding import beam_search
from mplug_jax.models.mplug import MPlug, decoding_fns
from mplug_jax.parity.rows import EXACT, SCORE


def checks(recording, case):
  """(name, function -> Rows) of every recorded search.

  Case.memory: what the decoder reads, case.prompt: i32[M, P].
  """
  names = sorted({name.rsplit("/", 1)[0] for name in recording.names("beam/")})
  return [(name, functools.partial(_rows, recording, case, name)) for name in names]


def _search(r, memory, prompt, beams, least, most):
  """Reference beam search -> decode.Generation of numpy arrays, padded with -1."""

  @jax.jit
  def search(params, memory, prompt):
    cache = r.model.apply(
      {"params": params}, memory, beams, prompt.shape[1] + most, method=MPlug.init_cache
    )
    step, reorder = decoding_fns(r.model, params)
    return beam_search.beam_search(
      step,
      reorder,
      cache,
      prompt,
      jnp.full(prompt.shape[:1], prompt.shape[1]),
      beams=beams,
      max_length=most,
      min_length=least,
      eos_id=r.eos,
      pad_id=-1,
      mode="reference",
    )

  return jax.tree.map(np.asarray, search(r.params, memory, prompt))


def _rows(r, case, name):
  options = re.fullmatch(r"beam/beam(\d+)_min(\d+)_max(\d+)", name)
  if not options:
    raise ValueError(f"{name!r} does not say its beams and lengths as beam<b>_min<m>_max<M>")
  ours = _search(r, case.memory, case.prompt, *map(int, options.groups()))
  yield from r.compare({"scores": ours.scores}, SCORE, f"{name}/")
  facts = r.meta.get("beam", {}).get(name.removeprefix("beam/"), {})
  if not facts.get("ids_equal_in_float64", True):
    r.skip(f"{name}/ids", "rounding decides them: the recorded code itself finds others in float64")
    r.skip(f"{name}/lengths", "as ids")
    return
  ids, lengths = _as_wide_as(r[f"{name}/ids"], ours.tokens), ours.lengths
  # Two hypotheses whose scores differ by less than two programs do may change places.
  if facts.get("min_score_gap_between_hyps", np.inf) <= SCORE.absolute:
    ids, lengths = _swapped(ids, lengths, r[f"{name}/ids"], r[f"{name}/scores"])
  yield from r.compare({"ids": ids, "lengths": lengths}, EXACT, f"{name}/")


def _as_wide_as(recorded, tokens):
  """Our tokens i32[B, K, T] cut or padded to the recorded width, unless that would cut tokens off."""
  width = recorded.shape[-1]
  if (tokens[..., width:] != -1).any():
    return tokens
  tokens = tokens[..., :width]
  return np.pad(tokens, ((0, 0), (0, 0), (0, width - tokens.shape[-1])), constant_values=-1)


def _swapped(ids, lengths, recorded_ids, scores):
  """Ids i32[B, K, W] and lengths i32[B, K] with hypotheses moved to where the same one was recorded at a tied score."""
  order = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
  for item, row in enumerate(order):
    for k in range(len(row)):
      tied = [
        n
        for n in range(k, len(row))
        if abs(scores[item, row[n]] - scores[item, k]) <= SCORE.absolute
      ]
      same = [n for n in tied if np.array_equal(ids[item, row[n]], recorded_ids[item, k])]
      if same:
        row[[k, same[0]]] = row[[same[0], k]]
  return np.take_along_axis(ids, order[:, :, None], axis=1), np.take_along_axis(
    lengths, order, axis=1
  )
