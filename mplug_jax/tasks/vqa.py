"""Visual question answering with generated answers or a list of candidates (paper section 4.2.1).

Shapes: B images, Q questions about each, L question tokens, A answers to each, T answer tokens,
V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int32, PRNGKeyArray

from mplug_jax.arrays import Array
from mplug_jax.data.examples import vqa_answers
from mplug_jax.decoding import answer_ranking, beam_search
from mplug_jax.losses import language_modeling
from mplug_jax.models.bert import Memory
from mplug_jax.models.mplug import MPlug, decoding_fns
from mplug_jax.tasks import base
from mplug_jax.tasks.base import Batch, Metrics, Params, PredictFn, Terms

_DISTILL_AXES = {"vocabulary": -1, "time": 1}


class VqaTask(base.Task):
  """Weighted cross-entropy over every distinct answer of a question.

  config.task:
    distill: {alpha, ramp_steps, axis}, see docs/official.md items 6 and 7; alpha 0 turns it off.
    beams, min_length, max_length, beam_mode: see decoding/beam_search.py.
    rank_answers: candidate answers of "rank", or a file of them, see
      data/examples/vqa_answers.py.
    rank_top_k, rank_first_token_twice: see decoding/answer_ranking.py.

  Raises:
    ValueError: distillation without a teacher or over an unknown axis; candidate answers that
      cannot be ranked.
  """

  zero_shot = (
    {
      "beams": 3,
      "min_length": 1,
      "max_length": 10,
      "beam_mode": "standard",
      "predict": "generate",
      "rank_answers": (),
      "rank_top_k": 128,
      "rank_first_token_twice": False,
      "distill": {"alpha": 0.0, "ramp_steps": 0, "axis": "vocabulary"},
    },
    {"max_question": 32},
  )

  def __init__(self, model: MPlug, config: Any, tokenizer: Any):
    super().__init__(model, config, tokenizer)
    if config.task.distill.alpha and not (
      config.ema.decay and config.ema.use in ("teacher", "both")
    ):
      raise ValueError(
        "config.task.distill.alpha needs a teacher: set config.ema.decay (0.995) and "
        "config.ema.use=teacher or both."
      )
    if config.task.distill.axis not in _DISTILL_AXES:
      raise ValueError(
        f"config.task.distill.axis={config.task.distill.axis!r} is not one of "
        f"{', '.join(_DISTILL_AXES)}."
      )
    self.answers = vqa_answers.candidate_answers(config, tokenizer)
    if self.answers and config.task.rank_top_k < 1:
      raise ValueError(
        f"config.task.rank_top_k={config.task.rank_top_k} must be at least 1; it is the number of "
        "candidate answers that are scored in full."
      )

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """See base.Task.batch_spec."""
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
    return base.batch_structs(batch_size, shapes)

  def encode(self, module: MPlug, batch: Batch) -> Memory:
    """Returns a Memory of B * Q rows: [image; question] after fusion.

    Each image or clip is encoded once for all its questions.
    """
    image = base.encode_image(module, batch["image"])
    ids = batch["question"].reshape(-1, batch["question"].shape[-1])
    mask = ids != self.tokenizer.pad_id
    image, text = module.fuse(module.encode_text(ids, mask), mask, image)
    return module.memory(image, text, mask)

  def forward(self, module: MPlug, batch: Batch) -> Float[Array, "rows length vocabulary"]:
    """Returns logits f32[B * Q * A, T, V] of the answers under teacher forcing."""
    ids = batch["answer"].reshape(-1, batch["answer"].shape[-1])
    logits: Any = module.decode(ids, ids != self.tokenizer.pad_id, self.encode(module, batch))
    return logits

  def explained_scores(self, module: MPlug, batch: Batch) -> Float[Array, "rows predicted"]:
    """Returns the log-probabilities of the answer's tokens after the first."""
    ids = batch["answer"].reshape(-1, batch["answer"].shape[-1])
    return base.next_token_scores(self.forward(module, batch), ids, self.tokenizer.pad_id)

  def predictions(
    self, module: MPlug, batch: Batch
  ) -> tuple[Float[Array, "rows predicted"], Bool[Array, "rows predicted"]]:
    """Next-token losses of the answers, see losses.language_modeling.vocabulary_losses.

    Args:
      module: bound model.
      batch: see `batch_spec`.

    Returns:
      (losses f32[B * Q * A, T - 1], whether the best token is right, bool of the same shape).
    """
    ids = batch["answer"].reshape(-1, batch["answer"].shape[-1])
    losses, right = module.decode_losses(
      ids, ids != self.tokenizer.pad_id, self.encode(module, batch), language_modeling.next_ids(ids)
    )
    return losses[:, :-1], right[:, :-1]

  def loss_normalizers(self, batch: Batch, rng: PRNGKeyArray) -> Terms:
    """Returns the number of questions."""
    return {"answer": batch["question_valid"].sum(dtype=jnp.float32)}

  def loss(
    self, params: Params, state: Any, batch: Batch, rng: PRNGKeyArray | None
  ) -> tuple[Terms, Metrics, Any]:
    """See base.Task.loss."""
    distill = self.config.task.distill
    labels = batch["answer"].reshape(-1, batch["answer"].shape[-1])[:, 1:]
    weight = batch["answer_weight"].reshape(-1, 1)
    if distill.alpha:
      logits = self.apply(params, self.forward, batch, rng=rng)
      alpha = distill.alpha * jnp.minimum(1.0, state.step / max(distill.ramp_steps, 1))
      teacher = self.apply(state.ema_params, self.forward, batch)
      losses = language_modeling.distilled_cross_entropy(
        logits[:, :-1], labels, teacher[:, :-1], alpha, _DISTILL_AXES[distill.axis]
      )
      right = logits[:, :-1].argmax(-1) == labels
    else:
      losses, right = self.apply(params, self.predictions, batch, rng=rng)
    counted = jnp.where(labels != self.tokenizer.pad_id, weight, 0.0)
    right = right * counted
    metrics = {
      "token_accuracy": (right.sum(), counted.sum()),
      "corrupt_images": (batch["corrupt"].sum(dtype=jnp.float32), jnp.float32(1.0)),
    }
    return {"answer": (losses * counted).sum()}, metrics, state.extra

  def predict_fns(self) -> dict[str, PredictFn]:
    """Returns "generate": token ids; with candidates also "rank": indices of candidate answers."""
    fns: dict[str, PredictFn] = {"generate": self._generate}
    if self.answers:
      fns["rank"] = self._rank
    return fns

  def _generate(self, params: Params, batch: Batch) -> dict[str, Array]:
    """Generates an answer to every question.

    Returns:
      {"tokens": i32[B, Q, 1 + max_length] with [bos], "length": i32[B, Q], "score": f32[B, Q]}.
    """
    options = self.config.task
    rows = batch["question"].shape[:2]
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

  def _candidates(self) -> Int32[Array, "candidates length"]:
    """i32[N, T]: the candidate answers as [bos] pieces [eos] pad..."""
    ids = [self.tokenizer.encode(answer) + [self.tokenizer.eos_id] for answer in self.answers]
    out = np.full((len(ids), max(map(len, ids))), self.tokenizer.pad_id, np.int32)
    for row, answer in zip(out, ids):
      row[: len(answer)] = answer
    return jnp.asarray(out)

  def _rank(self, params: Params, batch: Batch) -> dict[str, Array]:
    """Ranks the candidate answers of every question.

    Returns:
      {"answer": i32[B, Q, k] indices of candidates, most probable first,
      "probability": f32[B, Q, k]}.
    """
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


def score_fn(
  model: MPlug, params: Params, memory: Memory, pad_id: int
) -> Callable[
  [Int32[Array, "rows answers length"]], Float[Array, "rows answers length vocabulary"]
]:
  """Scores of answers under teacher forcing, for answer_ranking.rank.

  Args:
    model: model without parameters.
    params: parameters.
    memory: questions, M rows.
    pad_id: padding id.

  Returns:
    Function: ids i32[M, n, T] -> logits f32[M, n, T, V].
  """

  def score(ids):
    flat = ids.reshape(-1, ids.shape[-1])
    logits: Any = model.apply(
      {"params": params}, flat, flat != pad_id, memory, method=type(model).decode
    )
    return logits.reshape(ids.shape + (-1,))

  return score
