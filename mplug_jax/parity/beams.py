"""Recorded beam searches: scores, and exact ids and lengths except in recorded near ties."""

import functools
import re
from collections.abc import Iterator
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mplug_jax.decoding import beam_search
from mplug_jax.models.bert import Memory
from mplug_jax.models.mplug import MPlug, decoding_fns
from mplug_jax.parity.recording import Recording
from mplug_jax.parity.rows import EXACT, SCORE, Check, Row


class Case(Protocol):
  """Inputs of the searches of a recording."""

  prompt: Int[Array, "rows width"]

  @property
  def memory(self) -> Memory:
    """Memory of the decoder."""
    ...


def checks(recording: Recording, case: Case) -> list[Check]:
  """Returns a check of every recorded search.

  Args:
    recording: recorded file.
    case: memory of the decoder, and prompt i32[M, P].
  """
  names = sorted({name.rsplit("/", 1)[0] for name in recording.names("beam/")})
  return [(name, functools.partial(_rows, recording, case, name)) for name in names]


def _search(
  r: Recording,
  memory: Memory,
  prompt: Int[Array, "rows width"],
  beams: int,
  min_length: int,
  max_length: int,
) -> beam_search.Generation:
  """Runs the reference beam search; returns numpy arrays, padded with -1."""

  @jax.jit
  def search(params, memory, prompt):
    cache = r.model.apply(
      {"params": params}, memory, beams, prompt.shape[1] + max_length, method=MPlug.init_cache
    )
    step, reorder = decoding_fns(r.model, params)
    return beam_search.beam_search(
      step,
      reorder,
      cache,
      prompt,
      jnp.full(prompt.shape[:1], prompt.shape[1]),
      beams=beams,
      max_length=max_length,
      min_length=min_length,
      eos_id=r.eos,
      pad_id=-1,
      mode="reference",
    )

  return jax.tree.map(np.asarray, search(r.params, memory, prompt))


def _rows(r: Recording, case: Case, name: str) -> Iterator[Row]:
  """Yields the rows of a recorded search."""
  options = re.fullmatch(r"beam/beam(\d+)_min(\d+)_max(\d+)", name)
  if not options:
    raise ValueError(f"{name!r} does not say its beams and lengths as beam<b>_min<m>_max<M>")
  beams, min_length, max_length = map(int, options.groups())
  generation = _search(r, case.memory, case.prompt, beams, min_length, max_length)
  yield from r.compare({"scores": generation.scores}, SCORE, f"{name}/")
  facts = r.meta.get("beam", {}).get(name.removeprefix("beam/"), {})
  if not facts.get("ids_equal_in_float64", True):
    r.skip(f"{name}/ids", "rounding decides them: the recorded code itself finds others in float64")
    r.skip(f"{name}/lengths", "as ids")
    return
  ids = _as_wide_as(r[f"{name}/ids"], np.asarray(generation.tokens))
  lengths = np.asarray(generation.lengths)
  # Hypotheses whose scores differ by less than the rounding of two programs may swap.
  if facts.get("min_score_gap_between_hyps", np.inf) <= SCORE.absolute:
    ids, lengths = _swapped(ids, lengths, r[f"{name}/ids"], r[f"{name}/scores"])
  yield from r.compare({"ids": ids, "lengths": lengths}, EXACT, f"{name}/")


def _as_wide_as(
  recorded: Int[np.ndarray, "batch beams width"], tokens: Int[np.ndarray, "batch beams length"]
) -> Int[np.ndarray, "batch beams new_width"]:
  """Returns the tokens cut or padded to the recorded width, unless that would remove tokens."""
  width = recorded.shape[-1]
  if (tokens[..., width:] != -1).any():
    return tokens
  tokens = tokens[..., :width]
  return np.pad(tokens, ((0, 0), (0, 0), (0, width - tokens.shape[-1])), constant_values=-1)


def _swapped(
  ids: Int[np.ndarray, "batch beams width"],
  lengths: Int[np.ndarray, "batch beams"],
  recorded_ids: Int[np.ndarray, "batch beams recorded_width"],
  scores: Float[np.ndarray, "batch beams"],
) -> tuple[Int[np.ndarray, "batch beams width"], Int[np.ndarray, "batch beams"]]:
  """Moves hypotheses to the position at which they were recorded with a tied score."""
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
  ids = np.take_along_axis(ids, order[:, :, None], axis=1)
  return ids, np.take_along_axis(lengths, order, axis=1)
