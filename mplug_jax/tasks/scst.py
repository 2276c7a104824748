"""Self-critical sequence training of captions (Rennie et al. 2017), rewarded by CIDEr-D.

Shapes: B images, K candidates of each, T tokens of a candidate, P of them its prompt with [bos],
V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from mplug_jax import data
from mplug_jax.arrays import Array
from mplug_jax.decoding import beam_search, sampling
from mplug_jax.losses import language_modeling
from mplug_jax.models.bert import Memory
from mplug_jax.models.mplug import MPlug, decoding_fns
from mplug_jax.tasks import base, caption
from mplug_jax.tasks.base import Batch, Metrics, Params, PredictFn, Terms
from mplug_jax.tasks.scst_rewards import Rewards

CANDIDATES = ("beam", "sample")
BASELINES = ("mean", "greedy")
NORMALIZATIONS = ("official", "none")
LENGTH_PENALTY = 0.6  # As decoding/beam_search.py.


def log_probabilities(logits: Any, ids: Any, lengths: Any, start: int) -> Float[Array, "..."]:
  """Log-probability of generated tokens.

  Args:
    logits: f32[..., T, V] under teacher forcing.
    ids: i32[..., T].
    lengths: i32[...], prompt included.
    start: tokens of the prompt, which do not count.

  Returns:
    f32[...].
  """
  return sum_generated(
    -language_modeling.token_cross_entropy(logits[..., :-1, :], ids[..., 1:]), lengths, start
  )


def sum_generated(values: Any, lengths: Any, start: int) -> Float[Array, "..."]:
  """Sum over generated tokens.

  Args:
    values: f32[..., T - 1] of positions 1 to T - 1.
    lengths: i32[...], prompt included.
    start: tokens of the prompt.

  Returns:
    f32[...].
  """
  position = jnp.arange(1, values.shape[-1] + 1)
  return jnp.where((position >= start) & (position < lengths[..., None]), values, 0.0).sum(-1)


def length_penalties(lengths: Any, start: int, width: int) -> Float[Array, "..."]:
  """Divisor of the scores of beam search.

  Args:
    lengths: i32[...], prompt included.
    start: tokens of the prompt.
    width: largest length.

  Returns:
    f32[...], 1 where nothing was generated.
  """
  # In float64, as beam search.
  table = ((5 + np.maximum(np.arange(width + 1) - start, 1)) / 6) ** LENGTH_PENALTY
  return jnp.asarray(table, jnp.float32)[lengths]


def policy_losses(scores: Any, lengths: Any, advantage: Any, normalize: str) -> Float[Array, "..."]:
  """Policy gradient loss -score x advantage.

  Args:
    scores: f32[...], differentiable.
    lengths: i32[...], prompt included.
    advantage: f32[...], reward - baseline.
    normalize: "official" divides by the length (docs/official.md item 46); "none" does not.

  Returns:
    f32[...].
  """
  return -(scores / jnp.maximum(lengths, 1) if normalize == "official" else scores) * advantage


class ScstTask(caption.CaptionTask):
  """Policy gradient: mean over candidates of -(normalized log-probability) x (reward - baseline).

  `prepare` generates candidates with the current parameters and rewards them; the loss reads them
  under teacher forcing. Candidates that reach max_length without [eos] are rewarded like others;
  empty beams do not count.

  config.task, beside the fields of CaptionTask:
    candidates: "beam" for the K best, "sample" for K draws.
    count: K.
    sample_dropout: generate with dropout as the official code; slow, because it needs all tokens
      at every step instead of a cache.
    baseline: "mean" reward of the K candidates, as the official code, or reward of the "greedy"
      caption.
    normalize: see `policy_losses`; "official" also divides scores by the length penalty of beam
      search.

  Raises:
    ValueError: invalid value; the message names its key.
  """

  def __init__(self, model: MPlug, config: Any, tokenizer: Any):
    super().__init__(model, config, tokenizer)
    for name, known in (
      ("candidates", CANDIDATES),
      ("baseline", BASELINES),
      ("normalize", NORMALIZATIONS),
    ):
      if config.task[name] not in known:
        raise ValueError(
          f"config.task.{name}={config.task[name]!r} is not one of {', '.join(known)}."
        )
    if config.task.count < 2 and config.task.baseline == "mean":
      raise ValueError(
        f"config.task.count={config.task.count}: the mean of a single candidate is its own reward, "
        "so nothing would be learned; take more, or config.task.baseline=greedy."
      )
    if config.task.count < 1:
      raise ValueError(f"config.task.count={config.task.count} must be at least 1.")
    self._width = len(self.prompt.start) + config.task.max_length

  @functools.cached_property
  def _rewards(self) -> Rewards:
    return Rewards(data.get_source(self.config, "train"))

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """See base.Task.batch_spec."""
    given = super().batch_spec(batch_size)
    count = self.config.task.count
    shapes = dict(
      candidates=((count, self._width), jnp.int32),
      candidate_length=((count,), jnp.int32),
      reward=((count,), jnp.float32),
      baseline=((), jnp.float32),
      draw=((), jnp.int32),
    )
    kept = {name: given[name] for name in ("image", "mask", "corrupt", "index")}
    return kept | base.batch_structs(batch_size, shapes)

  def prepare(self, state: Any, batch: Batch, host: Any) -> Batch:
    """Adds candidates, their lengths (0 for those that do not count), rewards and baselines.

    Candidates of an unreadable image or of one without references do not count.

    See base.Task.prepare. "draw" holds the step, which the random keys follow.
    """
    batch = {name: batch[name] for name in ("image", "mask", "corrupt", "index")}
    batch["draw"] = np.full(len(batch["index"]), int(state.step), np.int32)
    out = host.predict["sample"](state.params, batch)
    out = {
      name: host.local_rows(out[name])
      for name in ("candidates", "length", "greedy", "greedy_length")
      if name in out
    }
    lengths = np.where(
      batch["corrupt"][:, None] | (out["length"] <= len(self.prompt.start)), 0, out["length"]
    )
    texts = [
      [self.text(ids[:length]) for ids, length in zip(*row)]
      for row in zip(out["candidates"], lengths)
    ]
    greedy = "greedy" in out
    if greedy:
      texts = [
        row + [self.text(ids[:length])]
        for row, ids, length in zip(texts, out["greedy"], out["greedy_length"])
      ]
    rewards = np.stack(self._rewards(texts, batch["index"]))
    lengths = np.where(np.isnan(rewards[:, :1]), 0, lengths)
    rewards = np.nan_to_num(rewards, nan=0.0)
    rewards, last = rewards[:, : lengths.shape[1]], rewards[:, -1]
    counted = lengths > 0
    baseline = last if greedy else (rewards * counted).sum(1) / np.maximum(counted.sum(1), 1)
    return batch | {
      "candidates": out["candidates"],
      "candidate_length": lengths,
      "reward": rewards,
      "baseline": baseline.astype(np.float32),
    }

  def text(self, ids: np.ndarray) -> str:
    """Returns the caption of generated ids i32[length], without its prompt."""
    return self.tokenizer.decode(ids).removeprefix(self.prompt.decoded).strip()

  def forward(self, module: MPlug, batch: Batch) -> Any:
    """Returns logits f32[B * K, T, V] of the candidates under teacher forcing."""
    return module.decode(*self._candidates(batch), self.encode(module, batch))

  def predictions(self, module: MPlug, batch: Batch) -> tuple[Any, Any]:
    """Next-token losses of the candidates, see CaptionTask.predictions.

    Args:
      module: bound model.
      batch: see `batch_spec`.

    Returns:
      (losses f32[B * K, T - 1], whether the best token is right bool[B * K, T - 1]).
    """
    ids, mask = self._candidates(batch)
    losses, right = module.decode_losses(
      ids, mask, self.encode(module, batch), language_modeling.next_ids(ids)
    )
    return losses[:, :-1], right[:, :-1]

  def _candidates(self, batch: Batch) -> tuple[Any, Any]:
    """Returns ids i32[B * K, T] and mask bool[B * K, T]."""
    return batch["candidates"].reshape(-1, self._width), jnp.arange(self._width) < batch[
      "candidate_length"
    ].reshape(-1, 1)

  def loss_normalizers(self, batch: Batch, rng: PRNGKeyArray) -> Terms:
    """Returns the number of candidates that count."""
    return {"policy": (batch["candidate_length"] > 0).sum(dtype=jnp.float32)}

  def loss(
    self, params: Params, state: Any, batch: Batch, rng: PRNGKeyArray | None
  ) -> tuple[Terms, Metrics, Any]:
    """See base.Task.loss."""
    options = self.config.task
    lengths = batch["candidate_length"]
    start = len(self.prompt.start)
    losses, _ = self.apply(params, self.predictions, batch, rng=rng)
    scores = sum_generated(-losses.reshape(lengths.shape + losses.shape[1:]), lengths, start)
    if options.normalize == "official":
      scores = scores / length_penalties(lengths, start, self._width)
    counted = lengths > 0
    policy = policy_losses(
      scores, lengths, batch["reward"] - batch["baseline"][:, None], options.normalize
    )
    last = jnp.take_along_axis(
      batch["candidates"], jnp.maximum(lengths - 1, 0)[..., None], axis=-1
    )[..., 0]
    count = counted.sum(dtype=jnp.float32)
    means = {
      "reward": batch["reward"],
      "baseline": jnp.broadcast_to(batch["baseline"][:, None], lengths.shape),
      "length": (lengths - start).astype(jnp.float32),
      "unfinished": (last != self.tokenizer.eos_id).astype(jnp.float32),
    }
    metrics = {name: (jnp.where(counted, x, 0.0).sum(), count) for name, x in means.items()}
    metrics["corrupt_images"] = (batch["corrupt"].sum(dtype=jnp.float32), jnp.float32(1.0))
    return {"policy": jnp.where(counted, policy, 0.0).sum()}, metrics, state.extra

  def predict_fns(self) -> dict[str, PredictFn]:
    """Returns those of CaptionTask, and "sample": the candidates."""
    return super().predict_fns() | {"sample": self._sample}

  def _sample(self, params: Params, batch: Batch) -> dict[str, Any]:
    """Generates candidates.

    Returns:
      {"candidates": i32[B, K, T], "length": i32[B, K]}; with a greedy baseline also
      {"greedy": i32[B, T], "greedy_length": i32[B]}.
    """
    options = self.config.task
    # "draw" is the same in all rows.
    rng = jax.random.fold_in(jax.random.key(self.config.seed), batch["draw"][0])
    encoder_key, decoder_key, draw_key = jax.random.split(rng, 3)
    memory = self.apply(
      params, self.encode, batch, rng=encoder_key if options.sample_dropout else None
    )
    if options.sample_dropout:
      step, reorder = whole_prefix_fns(self.model, params, memory, self.model_key(decoder_key))
      cache = jnp.full((memory.rows, options.count, self._width), self.tokenizer.pad_id, jnp.int32)
    else:
      step, reorder = decoding_fns(self.model, params)
      cache = self.cache(params, memory, options.count)
    start = self.starts(memory.rows)
    if options.candidates == "beam":
      generated = beam_search.beam_search(
        step,
        reorder,
        cache,
        *start,
        beams=options.count,
        mode=options.beam_mode,
        no_repeat_ngram=options.no_repeat_ngram,
        **self.limits(),
      )
    else:
      keys = jax.vmap(jax.random.fold_in, (None, 0))(draw_key, jnp.arange(memory.rows))
      generated = sampling.sample(
        step,
        cache,
        *start,
        keys,
        num_samples=options.count,
        no_repeat_ngram=options.no_repeat_ngram,
        **self.limits(),
      )
    out = {"candidates": generated.tokens, "length": generated.lengths}
    if options.baseline == "greedy":
      if options.sample_dropout:
        memory = self.apply(params, self.encode, batch)
      best = self.search(params, memory, beams=1)
      out |= {"greedy": best.tokens[:, 0], "greedy_length": best.lengths[:, 0]}
    return out


def whole_prefix_fns(
  model: MPlug, params: Params, memory: Memory, rng: PRNGKeyArray
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Decoding functions that read all tokens at every position, so that dropout acts on all.

  Args:
    model: model without parameters.
    params: parameters.
    memory: encoded images.
    rng: key for dropout, folded with the position.

  Returns:
    (step_fn, reorder_fn) of beam_search.beam_search; their cache is the tokens i32[B, K, T].
  """

  def step(cache, tokens, position):
    cache = jax.lax.dynamic_update_index_in_dim(cache, tokens, position, axis=2)
    ids = cache.reshape(-1, cache.shape[-1])
    known = jnp.broadcast_to(jnp.arange(ids.shape[1]) <= position, ids.shape)
    logits: Any = model.apply(
      {"params": params},
      ids,
      known,
      memory,
      method=type(model).decode,
      rngs={"dropout": jax.random.fold_in(rng, position)},
    )
    return jax.lax.dynamic_index_in_dim(logits, position, axis=1, keepdims=False).reshape(
      tokens.shape + (-1,)
    ), cache

  def reorder(cache, parents):
    return jnp.take_along_axis(cache, parents[:, :, None], axis=1)

  return step, reorder
