"""Pre-training: four objectives from one pass of every encoder (paper section 3.3).

Image-text contrast and matching as in retrieval.py, masked language modelling over the fused text, and prefix language modelling:
the decoder continues a caption whose beginning the encoders have read. Shapes: B images with a caption each, L text tokens,
T target tokens, D width, V vocabulary.
"""

import jax
import jax.numpy as jnp

from mplug_jax import losses
from mplug_jax.tasks import retrieval


class Task(retrieval.Task):
  """Terms "itc" and "itm" of retrieval.Task; "mlm", mean over the hidden tokens; "prefix_lm", mean over the target's tokens.

  config.task, beside retrieval's: `coefficients` of the four terms; `mlm_alpha`, weight of the teacher's distribution in "mlm", which
  grows as `alpha` does, 0: no teacher there.
  """

  def __init__(self, model, config, tokenizer):
    super().__init__(model, config, tokenizer)
    self.coefficients = dict(config.task.coefficients)
    if config.task.mlm_alpha and not self.has_teacher:
      raise ValueError(f"config.task.mlm_alpha={config.task.mlm_alpha} weighs the words of a teacher, and config.task.queue=0 has none: "
                       "set it to 0.")

  def batch_spec(self, batch_size):
    length = self.config.data.max_caption
    shapes = dict(masked=length, masked_label=length, prefix=length, target=length + 1)
    return super().batch_spec(batch_size) | {
        name: jax.ShapeDtypeStruct((batch_size, n), jnp.int32) for name, n in shapes.items()}

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

  def fuse_all(self, module, image, pairs, masked, prefix, target):
    """Everything behind the encoders.

    Args:
      image: f[B, N, D]. pairs: other arguments of retrieval.match. masked, prefix: see `encode_all`. target: i32[B, T].

    Returns:
      (match logits f32[B, 3, 2], masked logits f32[B, L, V], decoder logits f32[B, T, V]).
    """
    logits, _, (masked_read, prefix_read), image_read = retrieval.match(module, image, *pairs, more=(masked, prefix))
    decoded = module.decode(target, self._tokens(target), module.memory(image_read, prefix_read, prefix[1]))
    return logits, module.mlm_logits(masked_read), decoded

  def forward(self, module, batch):
    """Batch -> logits of `fuse_all`, each image and caption in the place of the negatives."""
    (image, _), (text, mask, _), masked, prefix = self.encode_all(module, batch)
    module.contrastive_temperature()
    return self.fuse_all(module, image, (text, mask, image, text, mask), masked, prefix, batch["target"])

  def _counted(self, batch):
    """(bool[B, L] hidden tokens, bool[B, T - 1] target tokens) of the rows that count."""
    valid = (batch["mask"] & ~batch["corrupt"])[:, None]
    return valid & self._tokens(batch["masked_label"]), valid & self._tokens(batch["target"][:, 1:])

  def weights(self, batch, rng):
    """As retrieval.Task; hidden tokens; target tokens."""
    hidden, target = self._counted(batch)
    return super().weights(batch, rng) | {"mlm": hidden.sum(dtype=jnp.float32), "prefix_lm": target.sum(dtype=jnp.float32)}

  def loss(self, params, state, batch, rng):
    """See base.Task.loss."""
    encode_rng, fuse_rng, contrast_rng = jax.random.split(rng, 3)
    image, text, masked, prefix = self.apply(params, self.encode_all, batch, rng=encode_rng)
    teacher = self.apply(state.ema_params, self._teach, batch) if self.has_teacher else (image, text, None)
    terms, metrics, extra, pairs = self.contrast(params, state, batch, image, text, *teacher[:2], contrast_rng)
    logits, masked_logits, decoded = self.apply(params, self.fuse_all, image[0], pairs, masked, prefix, batch["target"], rng=fuse_rng)
    itm, itm_metrics = self.matching(logits, batch)
    hidden, target = self._counted(batch)
    mlm = losses.token_cross_entropy(masked_logits, batch["masked_label"])
    if self.config.task.mlm_alpha:
      alpha = self.ramped(self.config.task.mlm_alpha, state.step)
      mlm = (1.0 - alpha) * mlm + alpha * losses.soft_cross_entropy(masked_logits, teacher[2])
    next_token = losses.token_cross_entropy(decoded[:, :-1], batch["target"][:, 1:])
    terms |= itm | {"mlm": jnp.where(hidden, mlm, 0.0).sum(), "prefix_lm": jnp.where(target, next_token, 0.0).sum()}
    right = {"mlm_accuracy": (masked_logits.argmax(-1) == batch["masked_label"], hidden),
             "prefix_lm_accuracy": (decoded[:, :-1].argmax(-1) == batch["target"][:, 1:], target)}
    return terms, metrics | itm_metrics | {
        name: ((x & counted).sum(dtype=jnp.float32), counted.sum(dtype=jnp.float32)) for name, (x, counted) in right.items()}, extra

  def _teach(self, module, batch):
    """Teacher's (`_image`, `_text`, logits of the masked captions f32[B, L, V] or None)."""
    if not self.config.task.mlm_alpha:
      return *self.encode(module, batch), None
    image, text, (masked, mask), _ = self.encode_all(module, batch)
    return image, text, module.mlm_logits(module.fuse(masked, mask, image[0])[1])
