"""Image captioning: the decoder reads image tokens only.

Sources: paper section 4.2.2, docs/official.md item 10.

Shapes: B images, C captions of each, T caption tokens, P prompt tokens with [bos], V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Int32, PRNGKeyArray

from mplug_jax.arrays import Array
from mplug_jax.data.examples import caption as data
from mplug_jax.decoding import beam_search
from mplug_jax.decoding.tokens import Generation
from mplug_jax.losses import language_modeling
from mplug_jax.models.bert import Memory
from mplug_jax.models.mplug import MPlug, decoding_fns
from mplug_jax.tasks import base
from mplug_jax.tasks.base import Batch, Metrics, Params, PredictFn, Terms


def targets(mask: Bool[Array, "rows length"], skip: int) -> Bool[Array, "rows predicted"]:
  """Positions whose token is predicted.

  Args:
    mask: bool[R, T], True for tokens, False for padding.
    skip: first positions, of the prompt, that are not predicted.

  Returns:
    bool[R, T - 1] for positions 1 to T - 1.
  """
  return jnp.asarray(mask)[:, 1:] & (jnp.arange(1, mask.shape[1]) >= skip)


def cross_entropy(
  logits: Float[Array, "rows length vocabulary"],
  ids: Int[Array, "rows length"],
  counted: Bool[Array, "rows predicted"],
) -> Float[Array, ""]:
  """Sum of the next-token losses.

  Args:
    logits: f32[R, T, V].
    ids: i32[R, T].
    counted: bool[R, T - 1], see `targets`.

  Returns:
    f32[].
  """
  return jnp.where(
    counted, language_modeling.token_cross_entropy(logits[:, :-1], ids[:, 1:]), 0.0
  ).sum()


class CaptionTask(base.Task):
  """Cross-entropy, averaged over all tokens of the global batch (docs/official.md item 8).

  config.task:
    prompt, prompt_mode: see data/examples/caption.py.
    min_length, max_length: generated tokens, [eos] included.
    beams, beam_mode, no_repeat_ngram: see decoding/beam_search.py.
  """

  zero_shot = (
    {
      "prompt": "",
      "prompt_mode": "standard",
      "beams": 3,
      "min_length": 1,
      "max_length": 25,
      "beam_mode": "standard",
      "no_repeat_ngram": 0,
    },
    {"max_caption": 32},
  )

  def __init__(self, model: MPlug, config: Any, tokenizer: Any):
    super().__init__(model, config, tokenizer)
    self.prompt = data.prompt(config, tokenizer)

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """See base.Task.batch_spec."""
    c = self.config.data
    shapes = dict(
      image=(base.image_shape(self.config, self.model.image_size), jnp.uint8),
      caption=((c.captions_per_image, c.max_caption), jnp.int32),
      caption_valid=((c.captions_per_image,), bool),
      mask=((), bool),
      corrupt=((), bool),
      index=((), jnp.int32),
    )
    return base.batch_structs(batch_size, shapes)

  def encode(self, module: MPlug, batch: Batch) -> Memory:
    """Returns a Memory of B rows: each image or clip is encoded once for all its captions."""
    return module.memory(base.encode_image(module, batch["image"]))

  def forward(self, module: MPlug, batch: Batch) -> Float[Array, "rows length vocabulary"]:
    """Returns logits f32[B * C, T, V] of the captions under teacher forcing."""
    ids, mask = self._captions(batch)
    logits: Any = module.decode(ids, mask, self.encode(module, batch))
    return logits

  def explained_scores(self, module: MPlug, batch: Batch) -> Float[Array, "rows predicted"]:
    """Returns the log-probabilities of the caption's tokens after the first."""
    ids = batch["caption"].reshape(-1, batch["caption"].shape[-1])
    return base.next_token_scores(self.forward(module, batch), ids, self.tokenizer.pad_id)

  def predictions(
    self, module: MPlug, batch: Batch
  ) -> tuple[Float[Array, "rows predicted"], Bool[Array, "rows predicted"]]:
    """Next-token losses of the captions, see losses.language_modeling.vocabulary_losses.

    Args:
      module: bound model.
      batch: see `batch_spec`.

    Returns:
      (losses f32[B * C, T - 1], whether the best token is right bool[B * C, T - 1]).
    """
    ids, mask = self._captions(batch)
    losses, right = module.decode_losses(
      ids, mask, self.encode(module, batch), language_modeling.next_ids(ids)
    )
    return losses[:, :-1], right[:, :-1]

  def _captions(self, batch: Batch) -> tuple[Any, Any]:
    """Returns ids i32[B * C, T] and mask bool[B * C, T], True for tokens of valid captions."""
    ids = batch["caption"].reshape(-1, batch["caption"].shape[-1])
    return ids, (ids != self.tokenizer.pad_id) & batch["caption_valid"].reshape(-1, 1)

  def _targets(self, batch: Batch) -> Bool[Array, "rows predicted"]:
    return targets(self._captions(batch)[1], len(self.prompt.ids))

  def loss_normalizers(self, batch: Batch, rng: PRNGKeyArray) -> Terms:
    """Returns the number of tokens to predict."""
    return {"caption": self._targets(batch).sum(dtype=jnp.float32)}

  def loss(
    self, params: Params, state: Any, batch: Batch, rng: PRNGKeyArray | None
  ) -> tuple[Terms, Metrics, Any]:
    """See base.Task.loss."""
    losses, right = self.apply(params, self.predictions, batch, rng=rng)
    counted = self._targets(batch)
    metrics = {
      "token_accuracy": ((right & counted).sum(dtype=jnp.float32), counted.sum(dtype=jnp.float32)),
      "corrupt_images": (batch["corrupt"].sum(dtype=jnp.float32), jnp.float32(1.0)),
    }
    return {"caption": jnp.where(counted, losses, 0.0).sum()}, metrics, state.extra

  def predict_fns(self) -> dict[str, PredictFn]:
    """Returns "generate": one caption per image, as token ids."""
    return {"generate": self._generate}

  def _generate(self, params: Params, batch: Batch) -> dict[str, Array]:
    """Generates one caption per image.

    Returns:
      {"tokens": i32[B, P + max_length] with [bos] and prompt, "length": i32[B], "score": f32[B]}.
    """
    return {name: x[:, 0] for name, x in self.captions(params, batch, 1).items()}

  def search(
    self,
    params: Params,
    memory: Memory,
    beams: int,
    starts: tuple[Any, Any] | None = None,
    **options: Any,
  ) -> Generation:
    """Beam search behind the prompt with the cached decoder.

    Args:
      params: parameters.
      memory: encoded images.
      beams: number of beams.
      starts: prompts and their lengths, see `starts`; by default those of the config.
      **options: n_best and mode of beam_search.beam_search.
    """
    step, reorder = decoding_fns(self.model, params)
    starts = starts or self.starts(memory.rows)
    return beam_search.beam_search(
      step,
      reorder,
      self.cache(params, memory, beams, starts[0].shape[1]),
      *starts,
      beams=beams,
      no_repeat_ngram=self.config.task.no_repeat_ngram,
      **self.limits(),
      **options,
    )

  def captions(self, params: Params, batch: Batch, count: int) -> dict[str, Array]:
    """Generates the best captions of each image.

    Args:
      params: parameters.
      batch: "image"; optionally a prompt per image, "prompt" i32[B, P] and "prompt_length" i32[B].
      count: captions K per image.

    Returns:
      {"tokens": i32[B, K, P + max_length], "length": i32[B, K], "score": f32[B, K]}.
    """
    options = self.config.task
    memory = self.apply(params, self.encode, self.with_tokens(params, batch))
    starts = (batch["prompt"], batch["prompt_length"]) if "prompt" in batch else None
    best = self.search(
      params, memory, max(options.beams, count), starts, n_best=count, mode=options.beam_mode
    )
    return {"tokens": best.tokens, "length": best.lengths, "score": best.scores}

  def cache(self, params: Params, memory: Memory, sequences: int, width: int = 0) -> Any:
    """Returns an empty cache of the decoder.

    Args:
      params: parameters.
      memory: encoded images.
      sequences: sequences per row of the memory.
      width: tokens of the prompt; 0: those of the config's prompt.
    """
    length = (width or len(self.prompt.start)) + self.config.task.max_length
    return self.apply(params, type(self.model).init_cache, memory, sequences, length)

  def starts(self, rows: Any) -> tuple[Int32[Array, "rows prompt"], Int32[Array, " rows"]]:
    """Returns the config's prompt i32[rows, P] and its length i32[rows] for every row."""
    start = jnp.asarray(self.prompt.start, jnp.int32)
    return jnp.tile(start, (rows, 1)), jnp.full((rows,), len(start), jnp.int32)

  def limits(self) -> dict[str, Any]:
    """Returns length limits and special ids, as arguments of beam search and sampling."""
    options = self.config.task
    return {
      "max_length": options.max_length,
      "min_length": options.min_length,
      "eos_id": self.tokenizer.eos_id,
      "pad_id": self.tokenizer.pad_id,
    }
