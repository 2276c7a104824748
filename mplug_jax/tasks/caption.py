"""Image captioning: the decoder reads the image tokens alone (paper section 4.2.2, docs/official.md item 10).

Shapes: B images, C captions of each, T caption tokens, P prompt tokens with [bos], V vocabulary.
"""

import jax
import jax.numpy as jnp

from mplug_jax.data.examples import caption as data
from mplug_jax.decoding import beam_search
from mplug_jax.losses import language_modeling
from mplug_jax.models.mplug import decoding_fns
from mplug_jax.tasks import base


def targets(mask, skip):
  """Which tokens are to be predicted: bool[R, T] (True = token) -> bool[R, T - 1], of positions 1 on; not the first `skip` positions."""
  return mask[:, 1:] & (jnp.arange(1, mask.shape[1]) >= skip)


def cross_entropy(logits, ids, counted):
  """Sum of the next-token losses. f32[R, T, V], i32[R, T], bool[R, T - 1] as of `targets` -> f32[]."""
  return jnp.where(
    counted, language_modeling.token_cross_entropy(logits[:, :-1], ids[:, 1:]), 0.0
  ).sum()


class CaptionTask(base.Task):
  """Cross-entropy, its mean over all tokens of the global batch (docs/official.md item 8).

  config.task: `prompt`, `prompt_mode` (see data/caption.py), `beams`, `min_length`, `max_length` (generated tokens, [eos] included),
  `beam_mode`, `no_repeat_ngram` of decode.beam_search.
  """

  def __init__(self, model, config, tokenizer):
    super().__init__(model, config, tokenizer)
    self.prompt = data.prompt(config, tokenizer)

  def batch_spec(self, batch_size):
    c = self.config.data
    shapes = dict(
      image=(base.image_shape(self.config, self.model.image_size), jnp.uint8),
      caption=((c.captions_per_image, c.max_caption), jnp.int32),
      caption_valid=((c.captions_per_image,), bool),
      mask=((), bool),
      corrupt=((), bool),
      index=((), jnp.int32),
    )
    return {
      name: jax.ShapeDtypeStruct((batch_size,) + shape, dtype)
      for name, (shape, dtype) in shapes.items()
    }

  def encode(self, module, batch):
    """Batch -> Memory of B rows: the tokens of an image or a clip, which is encoded once for its captions."""
    return module.memory(base.encode_image(module, batch["image"]))

  def forward(self, module, batch):
    """Batch -> logits f32[B * C, T, V] of its captions under teacher forcing."""
    ids, mask = self._captions(batch)
    return module.decode(ids, mask, self.encode(module, batch))

  def predictions(self, module, batch):
    """Batch -> (losses f32[B * C, T - 1], right bool[B * C, T - 1]) of the token behind each, see losses.vocabulary_losses."""
    ids, mask = self._captions(batch)
    found = module.decode_losses(
      ids, mask, self.encode(module, batch), language_modeling.next_ids(ids)
    )
    return tuple(x[:, :-1] for x in found)

  def _captions(self, batch):
    """-> ids i32[B * C, T], mask bool[B * C, T]: True = token of a caption that counts."""
    ids = batch["caption"].reshape(-1, batch["caption"].shape[-1])
    return ids, (ids != self.tokenizer.pad_id) & batch["caption_valid"].reshape(-1, 1)

  def _targets(self, batch):
    return targets(self._captions(batch)[1], len(self.prompt.ids))

  def loss_normalizers(self, batch, rng):
    """Tokens to predict in the batch."""
    return {"caption": self._targets(batch).sum(dtype=jnp.float32)}

  def loss(self, params, state, batch, rng):
    """See base.Task.loss."""
    each, right = self.apply(params, self.predictions, batch, rng=rng)
    counted = self._targets(batch)
    metrics = {
      "token_accuracy": ((right & counted).sum(dtype=jnp.float32), counted.sum(dtype=jnp.float32)),
      "corrupt_images": (batch["corrupt"].sum(dtype=jnp.float32), jnp.float32(1.0)),
    }
    return {"caption": jnp.where(counted, each, 0.0).sum()}, metrics, state.extra

  def predict_fns(self):
    """ "generate": one caption for each image as token ids."""
    return {"generate": self._generate}

  def _generate(self, params, batch):
    """-> {"tokens": i32[B, P + max_length] from [bos] on, prompt included, "length": i32[B], "score": f32[B]}."""
    return {name: x[:, 0] for name, x in self.captions(params, batch, 1).items()}

  def search(self, params, memory, beams, starts=None, **options):
    """Beam search behind the prompt with the cached decoder -> decode.Generation.

    starts: other prompts than the config's, see `starts`. options: n_best, mode of decode.beam_search.
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

  def captions(self, params, batch, count):
    """The `count` best captions of each image -> {"tokens": i32[B, K, P + max_length], "length": i32[B, K], "score": f32[B, K]}.

    A batch may have a "prompt" for every image, i32[B, P], and its "prompt_length", i32[B].
    """
    options, memory = (
      self.config.task,
      self.apply(params, self.encode, self.with_tokens(params, batch)),
    )
    starts = (batch["prompt"], batch["prompt_length"]) if "prompt" in batch else None
    best = self.search(
      params, memory, max(options.beams, count), starts, n_best=count, mode=options.beam_mode
    )
    return {"tokens": best.tokens, "length": best.lengths, "score": best.scores}

  def cache(self, params, memory, sequences, width=0):
    """The decoder's cache for so many sequences of each memory row, behind prompts of `width` tokens; 0: the config's."""
    length = (width or len(self.prompt.start)) + self.config.task.max_length
    return self.apply(params, type(self.model).init_cache, memory, sequences, length)

  def starts(self, rows):
    """-> prompt i32[rows, P], prompt_length i32[rows] of mplug_jax.decoding.beam_search."""
    start = jnp.asarray(self.prompt.start, jnp.int32)
    return jnp.tile(start, (rows, 1)), jnp.full((rows,), len(start), jnp.int32)

  def limits(self):
    """What every search of mplug_jax.decoding.beam_search is told."""
    options = self.config.task
    return {
      "max_length": options.max_length,
      "min_length": options.min_length,
      "eos_id": self.tokenizer.eos_id,
      "pad_id": self.tokenizer.pad_id,
    }
