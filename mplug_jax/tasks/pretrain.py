"""Pre-training: four objectives from one pass of every encoder (paper section 3.3).

Image-text contrast and matching as in retrieval.py, masked language modelling over the fused text, and prefix language modelling:
the decoder continues a caption whose beginning the encoders have read. Shapes: B images with a caption each, L text tokens,
T target tokens, D width, V vocabulary.
"""

import jax
import jax.numpy as jnp

from mplug_jax.losses import language_modeling
from mplug_jax.tasks import matching, retrieval


class PretrainTask(retrieval.RetrievalTask):
  """Terms "itc" and "itm" of retrieval.RetrievalTask; "mlm", mean over the hidden tokens; "prefix_lm", mean over the target's tokens.

  config.task, beside retrieval's: `coefficients` of the four terms; `mlm_alpha`, weight of the teacher's distribution in "mlm", which
  grows as `alpha` does, 0: no teacher there.
  """

  def __init__(self, model, config, tokenizer):
    super().__init__(model, config, tokenizer)
    self.coefficients = dict(config.task.coefficients)
    if config.task.mlm_alpha and not self.has_teacher:
      raise ValueError(
        f"config.task.mlm_alpha={config.task.mlm_alpha} weighs the words of a teacher, and config.task.queue=0 has none: "
        "set it to 0."
      )

  def batch_spec(self, batch_size):
    length = self.config.data.max_caption
    shapes = dict(masked=length, masked_label=length, prefix=length, target=length + 1)
    return super().batch_spec(batch_size) | {
      name: jax.ShapeDtypeStruct((batch_size, n), jnp.int32) for name, n in shapes.items()
    }

  def _tokens(self, ids):
    """bool: which ids are no padding."""
    return ids != self.tokenizer.pad_id

  def encode_all(self, module, batch):
    """Batch -> (`_image` of its images, `_text` of its captions, (tokens dtype[B, L, D], bool[B, L]) of the masked captions and of the
    prefixes); the text encoder runs once."""
    ids = jnp.stack([batch["caption"], batch["masked"], batch["prefix"]], axis=1)
    tokens, mask, features = self._text(module, ids.reshape(-1, ids.shape[-1]))
    tokens, mask, features = (x.reshape((-1, 3) + x.shape[1:]) for x in (tokens, mask, features))
    caption, masked, prefix = ((tokens[:, i], mask[:, i]) for i in range(3))
    return self._image(module, batch["image"]), (*caption, features[:, 0]), masked, prefix

  def fuse_all(self, module, image, pairs, masked, prefix, target, masked_label=None):
    """Everything behind the encoders.

    Args:
      image: f[B, N, D]. pairs: other arguments of retrieval.match. masked, prefix: see `encode_all`. target: i32[B, T].
      masked_label: i32[B, L], or None for logits.

    Returns:
      (match logits f32[B, 3, 2], masked logits f32[B, L, V], decoder logits f32[B, T, V]); with `masked_label` instead of the last two the
      (losses, right) of masked_label and of the token behind each of target, see losses.vocabulary_losses. With a teacher's distribution
      in "mlm", the masked logits come as they are.
    """
    logits, _, (masked_read, prefix_read), image_read = matching.match(
      module, image, *pairs, more=(masked, prefix)
    )
    decoder = (
      target,
      self._tokens(target),
      self._decoder_memory(module, image, image_read, prefix_read, prefix[1]),
    )
    if masked_label is None:
      return logits, module.mlm_logits(masked_read), module.decode(*decoder)
    hidden = (
      module.mlm_logits(masked_read)
      if self.config.task.mlm_alpha
      else module.mlm_losses(masked_read, masked_label)
    )
    return logits, hidden, module.decode_losses(*decoder, language_modeling.next_ids(target))

  @staticmethod
  def _decoder_memory(module, image, image_read, prefix_read, mask):
    """What the decoder reads: fused image and prefix, or, where the prefix is [bos] alone, the image as captioning has it.

    image, image_read: dtype[B, N, D], before and after fusion. prefix_read: dtype[B, L, D]. mask: bool[B, L].
    """
    empty = mask.sum(axis=1, keepdims=True) < 2
    return module.memory(jnp.where(empty[..., None], image, image_read), prefix_read, mask & ~empty)

  def forward(self, module, batch):
    """Batch -> logits of `fuse_all`, each image and caption in the place of the negatives."""
    (image, _), (text, mask, _), masked, prefix = self.encode_all(module, batch)
    module.contrastive_temperature()
    return self.fuse_all(
      module, image, (text, mask, image, text, mask), masked, prefix, batch["target"]
    )

  def _counted(self, batch):
    """(bool[B, L] hidden tokens, bool[B, T - 1] target tokens) of the rows that count."""
    valid = (batch["mask"] & ~batch["corrupt"])[:, None]
    return valid & self._tokens(batch["masked_label"]), valid & self._tokens(batch["target"][:, 1:])

  def loss_normalizers(self, batch, rng):
    """As retrieval.RetrievalTask; hidden tokens; target tokens."""
    hidden, target = self._counted(batch)
    return super().loss_normalizers(batch, rng) | {
      "mlm": hidden.sum(dtype=jnp.float32),
      "prefix_lm": target.sum(dtype=jnp.float32),
    }

  def encode_rows(self, params, state, batch, rng):
    """As retrieval.RetrievalTask; `encoded` is what `encode_all` gives, and with config.task.mlm_alpha what it gives by the teacher."""
    encoded = self.apply(params, self.encode_all, batch, rng=rng)
    if not self.config.task.mlm_alpha:
      taught, features = None, self._teacher_features(state, batch)
    else:
      taught = self.apply(state.ema_params, self.encode_all, batch)
      features = {"teacher_image": taught[0][1], "teacher_text": taught[1][2]}
    return (encoded, taught), {"image": encoded[0][1], "text": encoded[1][2]} | features

  def rest(self, params, state, encoded, drawn, batch, rng):
    """The terms "itm", "mlm" and "prefix_lm". See base.ComparingTask."""
    (image, text, masked, prefix), taught = encoded
    image, *pairs = self.pairs(image, text, drawn)
    logits, words, next_token = self.apply(
      params,
      self.fuse_all,
      image,
      pairs,
      masked,
      prefix,
      batch["target"],
      batch["masked_label"],
      rng=rng,
    )
    terms, metrics = self.matching(logits, batch)
    hidden, target = self._counted(batch)
    if taught is not None:
      alpha, soft = (
        self.ramped(self.config.task.mlm_alpha, state.step),
        self.apply(state.ema_params, self._masked_logits, *taught[::2]),
      )
      words = (
        language_modeling.distilled_cross_entropy(words, batch["masked_label"], soft, alpha),
        words.argmax(-1) == batch["masked_label"],
      )
    found = {"mlm": (*words, hidden), "prefix_lm": (*(x[:, :-1] for x in next_token), target)}
    terms |= {
      name: jnp.where(counted, each, 0.0).sum() for name, (each, _, counted) in found.items()
    }
    return terms, metrics | {
      f"{name}_accuracy": ((right & counted).sum(dtype=jnp.float32), counted.sum(dtype=jnp.float32))
      for name, (_, right, counted) in found.items()
    }

  def _masked_logits(self, module, image, masked):
    """`_image` of images, tokens and mask of masked captions -> f32[B, L, V]."""
    return module.mlm_logits(module.fuse(*masked, image[0])[1])
