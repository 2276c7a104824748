"""Visual question answering: answers are generated, or chosen from a list (paper section 4.2.1).

Shapes: B images, Q questions about each, L question tokens, A answers to each, T answer tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.data.examples import vqa as data
from mplug_jax.decoding import answer_ranking, beam_search
from mplug_jax.losses import language_modeling
from mplug_jax.models.mplug import decoding_fns
from mplug_jax.tasks import base

_DISTILL_AXES = {"vocabulary": -1, "time": 1}


class VqaTask(base.Task):
  """Weighted cross-entropy over every distinct answer of a question.

  config.task: `distill` {alpha, ramp_steps, axis} or alpha 0 = off (docs/official.md items 6 and 7), `beams`,
  `min_length`, `max_length`, `beam_mode`, `rank_answers` (candidate strings for "rank"; or a file, see data/vqa.py), `rank_top_k`,
  `rank_first_token_twice`.
  """

  def __init__(self, model, config, tokenizer):
    super().__init__(model, config, tokenizer)
    if config.task.distill.alpha and not (
      config.ema.decay and config.ema.use in ("teacher", "both")
    ):
      raise ValueError(
        "config.task.distill.alpha needs a teacher: set config.ema.decay (0.995) and config.ema.use=teacher or both."
      )
    if config.task.distill.axis not in _DISTILL_AXES:
      raise ValueError(
        f"config.task.distill.axis={config.task.distill.axis!r} is not one of {', '.join(_DISTILL_AXES)}."
      )
    self.answers = data.candidate_answers(config)

  def batch_spec(self, batch_size):
    c = self.config.data
    questions, answers = c.questions_per_image, c.max_answers
    shapes = dict(
      image=(base.image_shape(self.config, self.model.image_size), jnp.uint8),
      question=((questions, c.max_question), jnp.int32),
      answer=((questions, answers, c.max_answer_tokens), jnp.int32),
      answer_weight=((questions, answers), jnp.float32),
      question_valid=((questions,), bool),
      mask=((), bool),
      corrupt=((), bool),
      index=((), jnp.int32),
    )
    return {
      name: jax.ShapeDtypeStruct((batch_size,) + shape, dtype)
      for name, (shape, dtype) in shapes.items()
    }

  def encode(self, module, batch):
    """Batch -> Memory of B * Q rows: [image; question] after fusion. An image, or a clip, is encoded once for its questions."""
    image = base.encode_image(module, batch["image"])
    ids = batch["question"].reshape(-1, batch["question"].shape[-1])
    mask = ids != self.tokenizer.pad_id
    image, text = module.fuse(module.encode_text(ids, mask), mask, image)
    return module.memory(image, text, mask)

  def forward(self, module, batch):
    """Batch -> logits f32[B * Q * A, T, V] of its answers under teacher forcing."""
    ids = batch["answer"].reshape(-1, batch["answer"].shape[-1])
    return module.decode(ids, ids != self.tokenizer.pad_id, self.encode(module, batch))

  def predictions(self, module, batch):
    """Batch -> (losses f32[R, T - 1], right bool[R, T - 1]) of the token behind each, R = B * Q * A, see losses.vocabulary_losses."""
    ids = batch["answer"].reshape(-1, batch["answer"].shape[-1])
    found = module.decode_losses(
      ids, ids != self.tokenizer.pad_id, self.encode(module, batch), language_modeling.next_ids(ids)
    )
    return tuple(x[:, :-1] for x in found)

  def loss_normalizers(self, batch, rng):
    """Questions in the batch."""
    return {"answer": batch["question_valid"].sum(dtype=jnp.float32)}

  def loss(self, params, state, batch, rng):
    """See base.Task.loss."""
    distill = self.config.task.distill
    labels = batch["answer"].reshape(-1, batch["answer"].shape[-1])[:, 1:]
    weight = batch["answer_weight"].reshape(-1, 1)
    if distill.alpha:
      logits = self.apply(params, self.forward, batch, rng=rng)
      alpha = distill.alpha * jnp.minimum(1.0, state.step / max(distill.ramp_steps, 1))
      teacher = self.apply(state.ema_params, self.forward, batch)
      each = language_modeling.distilled_cross_entropy(
        logits[:, :-1], labels, teacher[:, :-1], alpha, _DISTILL_AXES[distill.axis]
      )
      right = logits[:, :-1].argmax(-1) == labels
    else:
      each, right = self.apply(params, self.predictions, batch, rng=rng)
    counted = jnp.where(labels != self.tokenizer.pad_id, weight, 0.0)
    total, right = (each * counted).sum(), right * counted
    metrics = {
      "token_accuracy": (right.sum(), counted.sum()),
      "corrupt_images": (batch["corrupt"].sum(dtype=jnp.float32), jnp.float32(1.0)),
    }
    return {"answer": total}, metrics, state.extra

  def predict_fns(self):
    """ "generate": answers as token ids; "rank": indices into the candidate answers, when there are any."""
    fns = {"generate": self._generate}
    if self.answers:
      fns["rank"] = self._rank
    return fns

  def _generate(self, params, batch):
    """-> {"tokens": i32[B, Q, 1 + max_length] from [bos] on, "length": i32[B, Q], "score": f32[B, Q]}."""
    options, rows = self.config.task, batch["question"].shape[:2]
    memory = self.apply(params, self.encode, self.with_tokens(params, batch))
    cache = self.apply(
      params, type(self.model).init_cache, memory, options.beams, options.max_length + 1
    )
    step, reorder = decoding_fns(self.model, params)
    prompt = jnp.full((memory.rows, 1), self.tokenizer.bos_id, jnp.int32)
    best = beam_search.beam_search(
      step,
      reorder,
      cache,
      prompt,
      jnp.ones((memory.rows,), jnp.int32),
      beams=options.beams,
      n_best=1,
      max_length=options.max_length,
      min_length=options.min_length,
      eos_id=self.tokenizer.eos_id,
      pad_id=self.tokenizer.pad_id,
      mode=options.beam_mode,
    )
    return {
      "tokens": best.tokens[:, 0].reshape(rows + (-1,)),
      "length": best.lengths[:, 0].reshape(rows),
      "score": best.scores[:, 0].reshape(rows),
    }

  def _candidates(self):
    """i32[N, T]: the candidate answers as [bos] pieces [eos] pad..."""
    ids = [self.tokenizer.encode(answer) + [self.tokenizer.eos_id] for answer in self.answers]
    out = np.full((len(ids), max(map(len, ids))), self.tokenizer.pad_id, np.int32)
    for row, answer in zip(out, ids):
      row[: len(answer)] = answer
    return jnp.asarray(out)

  def _rank(self, params, batch):
    """-> {"answer": i32[B, Q, k] indices of candidates, most probable first, "probability": f32[B, Q, k]}."""
    rows = batch["question"].shape[:2]
    memory = self.apply(params, self.encode, self.with_tokens(params, batch))
    ranked = answer_ranking.rank(
      score_fn(self.model, params, memory, self.tokenizer.pad_id),
      memory.rows,
      self._candidates(),
      top_k=self.config.task.rank_top_k,
      pad_id=self.tokenizer.pad_id,
      first_token_twice=self.config.task.rank_first_token_twice,
    )
    return {
      "answer": ranked.answers.reshape(rows + (-1,)),
      "probability": ranked.probabilities.reshape(rows + (-1,)),
    }


def score_fn(model, params, memory, pad_id):
  """Function i32[M, n, T] -> f32[M, n, T, V] of teacher-forced logits over `memory` of M rows, for ranking.rank."""

  def score(ids):
    flat = ids.reshape(-1, ids.shape[-1])
    logits = model.apply(
      {"params": params}, flat, flat != pad_id, memory, method=type(model).decode
    )
    return logits.reshape(ids.shape + (-1,))

  return score
