"""Self-critical training of captions (SCST, Rennie et al. 2017): candidates are generated, and CIDEr-D rewards them.

Shapes: B images, K candidates of each, T tokens of a candidate, P of them its prompt with [bos], V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax import data
from mplug_jax.decoding import beam_search, sampling
from mplug_jax.losses import language_modeling
from mplug_jax.metrics import captioning
from mplug_jax.models.mplug import decoding_fns
from mplug_jax.tasks import caption

CANDIDATES, BASELINES, NORMALISATIONS = ("beam", "sample"), ("mean", "greedy"), ("official", "none")
LENGTH_PENALTY = 0.6  # of decode.beam_search


def log_probabilities(logits, ids, lengths, start):
  """Log-probability of what was generated behind a prompt of `start` tokens. f32[..., T, V], i32[..., T], i32[...] -> f32[...]."""
  return sum_generated(
    -language_modeling.token_cross_entropy(logits[..., :-1, :], ids[..., 1:]), lengths, start
  )


def sum_generated(each, lengths, start):
  """The sum of what belongs to generated tokens: f32[..., T - 1] of positions 1 on, i32[...] -> f32[...]."""
  position = jnp.arange(1, each.shape[-1] + 1)
  return jnp.where((position >= start) & (position < lengths[..., None]), each, 0.0).sum(-1)


def length_penalties(lengths, start, width):
  """The divisor of decode.beam_search's scores: i32[...], at most `width` -> f32[...], 1 where nothing was generated."""
  table = (
    (5 + np.maximum(np.arange(width + 1) - start, 1)) / 6
  ) ** LENGTH_PENALTY  # in float64, as there
  return jnp.asarray(table, jnp.float32)[lengths]


def policy_losses(scores, lengths, advantage, normalize):
  """-score x advantage, f32[...]; "official" divides it by the tokens of the whole sequence too (docs/official.md item 46).

  Args:
    scores: f32[...], what the gradient goes through. lengths: i32[...], prompt included. advantage: f32[...], reward - baseline.
    normalize: "official" or "none".
  """
  return -(scores / jnp.maximum(lengths, 1) if normalize == "official" else scores) * advantage


class Rewards:
  """CIDEr-D of candidates against the captions of their image, words weighted by their document frequency in all training captions.

  Args:
    source: the training records, see data/chunked.py.
  """

  def __init__(self, source):
    self._image = source.record
    images = source.source
    counts = images.counts()
    tokens = captioning.tokenize([text for i in range(len(images)) for text in images.captions(i)])
    ends = counts.cumsum()
    self._references = [tokens[end - count : end] for end, count in zip(ends, counts)]
    self._metric = captioning.CiderD(self._references)

  def __call__(self, candidates, indices):
    """[[text, ...] of each row], record number of each row -> [f32[texts of the row] from 0 to 10, ...]."""
    tokens = [
      captioning.tokenize([text])[0] for texts in candidates for text in texts
    ]  # alone: the text behind may change the last word
    references = [
      self._references[self._image[index]]
      for texts, index in zip(candidates, indices)
      for _ in texts
    ]
    scores = self._metric.score(tokens, references)
    return np.split(
      np.asarray(scores, np.float32), np.cumsum([len(texts) for texts in candidates])[:-1]
    )


class ScstTask(caption.CaptionTask):
  """Policy gradient: the mean over candidates of -(log-probability, normalised) x (reward - baseline).

  `prepare` generates and rewards with the parameters at hand; the loss reads the candidates by teacher forcing. Candidates
  are rewarded as they stand, also those that reach max_length without [eos]; an empty place in a beam counts for nothing.

  config.task, besides captioning's: `candidates` "beam" (the K best) or "sample" (K draws), `count` K, `sample_dropout`
  (generate with dropout, as official; then without a cache: slow), `baseline` "mean" (of the K, the candidate itself among them,
  as official) or "greedy" (the reward of the greedy caption), `normalize` "official" or "none" (see policy_losses; the
  official score is divided by the beam search's length penalty besides).
  """

  def __init__(self, model, config, tokenizer):
    super().__init__(model, config, tokenizer)
    for name, known in (
      ("candidates", CANDIDATES),
      ("baseline", BASELINES),
      ("normalize", NORMALISATIONS),
    ):
      if config.task[name] not in known:
        raise ValueError(
          f"config.task.{name}={config.task[name]!r} is not one of {', '.join(known)}."
        )
    if config.task.count < 2 and config.task.baseline == "mean":
      raise ValueError(
        f"config.task.count={config.task.count}: the mean of a single candidate is its own reward, so nothing would be "
        "learnt; take more, or config.task.baseline=greedy."
      )
    if config.task.count < 1:
      raise ValueError(f"config.task.count={config.task.count} must be at least 1.")
    self._width = len(self.prompt.start) + config.task.max_length

  @functools.cached_property
  def _rewards(self):
    return Rewards(data.get_source(self.config, "train"))

  def batch_spec(self, batch_size):
    given = super().batch_spec(batch_size)
    count = self.config.task.count
    shapes = dict(
      candidates=((count, self._width), jnp.int32),
      candidate_length=((count,), jnp.int32),
      reward=((count,), jnp.float32),
      baseline=((), jnp.float32),
      draw=((), jnp.int32),
    )
    return {name: given[name] for name in ("image", "mask", "corrupt", "index")} | {
      name: jax.ShapeDtypeStruct((batch_size,) + shape, dtype)
      for name, (shape, dtype) in shapes.items()
    }

  def prepare(self, state, batch, host):
    """Adds candidates, their lengths (0: counts for nothing), rewards and baselines. `draw` is the step, which the keys follow."""
    batch = {name: batch[name] for name in ("image", "mask", "corrupt", "index")}
    batch["draw"] = np.full(len(batch["index"]), int(state.step), np.int32)
    out = host.predict["sample"](state.params, batch)
    out = {
      name: host.own(out[name])
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
    rewards, last = rewards[:, : lengths.shape[1]], rewards[:, -1]
    counted = lengths > 0
    baseline = last if greedy else (rewards * counted).sum(1) / np.maximum(counted.sum(1), 1)
    return batch | {
      "candidates": out["candidates"],
      "candidate_length": lengths,
      "reward": rewards,
      "baseline": baseline.astype(np.float32),
    }

  def text(self, ids):
    """Generated ids -> the caption without its prompt."""
    return self.tokenizer.decode(ids).removeprefix(self.prompt.said).strip()

  def forward(self, module, batch):
    """Batch -> logits f32[B * K, T, V] of its candidates under teacher forcing."""
    return module.decode(*self._candidates(batch), self.encode(module, batch))

  def predictions(self, module, batch):
    """Batch -> (losses f32[B * K, T - 1], right bool[B * K, T - 1]) of the token behind each, see losses.vocabulary_losses."""
    ids, mask = self._candidates(batch)
    return tuple(
      x[:, :-1]
      for x in module.decode_losses(
        ids, mask, self.encode(module, batch), language_modeling.next_ids(ids)
      )
    )

  def _candidates(self, batch):
    """-> ids i32[B * K, T], mask bool[B * K, T]."""
    return batch["candidates"].reshape(-1, self._width), jnp.arange(self._width) < batch[
      "candidate_length"
    ].reshape(-1, 1)

  def loss_normalizers(self, batch, rng):
    """Candidates in the batch."""
    return {"policy": (batch["candidate_length"] > 0).sum(dtype=jnp.float32)}

  def loss(self, params, state, batch, rng):
    """See base.Task.loss."""
    options, lengths, start = self.config.task, batch["candidate_length"], len(self.prompt.start)
    each, _ = self.apply(params, self.predictions, batch, rng=rng)
    scores = sum_generated(-each.reshape(lengths.shape + each.shape[1:]), lengths, start)
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

  def predict_fns(self):
    """Captioning's, and "sample": the candidates."""
    return super().predict_fns() | {"sample": self._sample}

  def _sample(self, params, batch):
    """-> {"candidates": i32[B, K, T], "length": i32[B, K]}, with a greedy baseline also {"greedy": i32[B, T], "greedy_length": i32[B]}."""
    options = self.config.task
    rng = jax.random.fold_in(
      jax.random.key(self.config.seed), batch["draw"][0]
    )  # the same in all rows
    encoder_key, decoder_key, draw_key = jax.random.split(rng, 3)
    memory = self.apply(
      params, self.encode, batch, rng=encoder_key if options.sample_dropout else None
    )
    if options.sample_dropout:
      step, reorder = whole_prefix_fns(self.model, params, memory, decoder_key)
      cache = jnp.full((memory.rows, options.count, self._width), self.tokenizer.pad_id, jnp.int32)
    else:
      (step, reorder), cache = (
        decoding_fns(self.model, params),
        self.cache(params, memory, options.count),
      )
    start = self.starts(memory.rows)
    if options.candidates == "beam":
      found = beam_search.beam_search(
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
      found = sampling.sample(
        step,
        cache,
        *start,
        keys,
        num_samples=options.count,
        no_repeat_ngram=options.no_repeat_ngram,
        **self.limits(),
      )
    out = {"candidates": found.tokens, "length": found.lengths}
    if options.baseline == "greedy":
      if options.sample_dropout:
        memory = self.apply(params, self.encode, batch)
      best = self.search(params, memory, beams=1)
      out |= {"greedy": best.tokens[:, 0], "greedy_length": best.lengths[:, 0]}
    return out


def whole_prefix_fns(model, params, memory, rng):
  """(step_fn, reorder_fn) for mplug_jax.decoding.beam_search that read the whole prefix at every position, so that dropout acts everywhere.

  Their cache is the tokens so far, i32[B, K, T]. rng: key of the dropout, which every position folds its number into.
  """

  def step(cache, tokens, position):
    cache = jax.lax.dynamic_update_index_in_dim(cache, tokens, position, axis=2)
    ids = cache.reshape(-1, cache.shape[-1])
    known = jnp.broadcast_to(jnp.arange(ids.shape[1]) <= position, ids.shape)
    logits = model.apply(
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
