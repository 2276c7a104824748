"""Pre-training: four objectives from one pass of every encoder (paper section 3.3).

Image-text contrast and matching as in retrieval.py, masked language modeling over the fused text,
and prefix language modeling: the decoder continues a caption whose beginning the encoders read.
Shapes: B images with a caption each, L text tokens, T target tokens, D width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray

from mplug_jax.arrays import Array
from mplug_jax.losses import language_modeling
from mplug_jax.models.bert import Memory
from mplug_jax.models.mplug import MPlug
from mplug_jax.tasks import matching, retrieval, two_pass
from mplug_jax.tasks.base import Batch, Metrics, Params, Terms
from mplug_jax.tasks.matching import Text
from mplug_jax.tasks.retrieval import Images, Texts


class PretrainTask(retrieval.RetrievalTask):
  """Contrastive, matching, masked and prefix language modeling losses.

  Loss terms:
    itc, itm: see RetrievalTask.
    mlm: mean over the masked tokens.
    prefix_lm: mean over the target tokens.

  config.task, beside the fields of RetrievalTask:
    coefficients: {term: coefficient} of the four terms.
    mlm_alpha: weight of the teacher's distribution in "mlm", with the ramp of `alpha`; 0: none.

  Raises:
    ValueError: mlm_alpha without a teacher, and as RetrievalTask.
  """

  def __init__(self, model: MPlug, config: Any, tokenizer: Any):
    super().__init__(model, config, tokenizer)
    self.coefficients = dict(config.task.coefficients)
    if config.task.mlm_alpha and not self.has_teacher:
      raise ValueError(
        f"config.task.mlm_alpha={config.task.mlm_alpha} weighs the words of a teacher, and "
        "config.task.queue=0 has none: set it to 0."
      )

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """See base.Task.batch_spec."""
    length = self.config.data.max_caption
    shapes = dict(masked=length, masked_label=length, prefix=length, target=length + 1)
    return super().batch_spec(batch_size) | {
      name: jax.ShapeDtypeStruct((batch_size, n), jnp.int32) for name, n in shapes.items()
    }

  def _tokens(self, ids: Any) -> Any:
    """Mask of the ids that are not padding."""
    return ids != self.tokenizer.pad_id

  def encode_all(self, module: MPlug, batch: Batch) -> tuple[Images, Texts, Text, Text]:
    """Encodes images, captions, masked captions and prefixes; the text encoder runs once.

    Args:
      module: bound model.
      batch: see `batch_spec`.

    Returns:
      (images, captions, masked captions, prefixes).
    """
    ids = jnp.stack([batch["caption"], batch["masked"], batch["prefix"]], axis=1)
    tokens, mask, features = self._text(module, ids.reshape(-1, ids.shape[-1]))
    tokens, mask, features = (x.reshape((-1, 3) + x.shape[1:]) for x in (tokens, mask, features))
    caption, masked, prefix = ((tokens[:, i], mask[:, i]) for i in range(3))
    return self._image(module, batch["image"]), (*caption, features[:, 0]), masked, prefix

  def fuse_all(
    self,
    module: MPlug,
    image: Float[Array, "batch tokens width"],
    pairs: Sequence[Any],
    masked: Text,
    prefix: Text,
    target: Any,
    masked_label: Any = None,
  ) -> tuple[Float[Array, "batch 3 2"], Any, Any]:
    """Applies the fusion encoder, the decoder and the heads.

    Args:
      module: bound model.
      image: image tokens f[B, N, D].
      pairs: further arguments of matching.match.
      masked: masked captions.
      prefix: prefixes.
      target: i32[B, T].
      masked_label: i32[B, L], or None for logits.

    Returns:
      Matching logits f32[B, 3, 2], and for "mlm" and "prefix_lm" each: without `masked_label`,
      logits f32[B, L, V] and f32[B, T, V]; with it, (losses, whether the best token is right) of
      the labels and of the next target tokens, see language_modeling.vocabulary_losses. With
      config.task.mlm_alpha, "mlm" has logits in either case.
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
  def _decoder_memory(
    module: MPlug, image: Any, image_read: Any, prefix_read: Any, mask: Any
  ) -> Memory:
    """Memory of the decoder: fused image and prefix; for an empty prefix the image, as captioning.

    Args:
      module: bound model.
      image: dtype[B, N, D] before fusion.
      image_read: dtype[B, N, D] after fusion.
      prefix_read: fused prefixes dtype[B, L, D].
      mask: bool[B, L] of the prefixes; an empty one has [bos] only.
    """
    empty = mask.sum(axis=1, keepdims=True) < 2
    return module.memory(jnp.where(empty[..., None], image, image_read), prefix_read, mask & ~empty)

  def forward(self, module: MPlug, batch: Batch) -> Any:
    """Returns logits of `fuse_all` with each pair itself in place of the negatives."""
    (image, _), (text, mask, _), masked, prefix = self.encode_all(module, batch)
    module.contrastive_temperature()
    return self.fuse_all(
      module, image, (text, mask, image, text, mask), masked, prefix, batch["target"]
    )

  def _counted(self, batch: Batch) -> tuple[Any, Any]:
    """Masks of the masked tokens bool[B, L] and target tokens bool[B, T - 1] that count."""
    valid = (batch["mask"] & ~batch["corrupt"])[:, None]
    return valid & self._tokens(batch["masked_label"]), valid & self._tokens(batch["target"][:, 1:])

  def loss_normalizers(self, batch: Batch, rng: PRNGKeyArray) -> Terms:
    """See RetrievalTask; also the numbers of masked tokens and of target tokens."""
    hidden, target = self._counted(batch)
    return super().loss_normalizers(batch, rng) | {
      "mlm": hidden.sum(dtype=jnp.float32),
      "prefix_lm": target.sum(dtype=jnp.float32),
    }

  def encode_rows(
    self, params: Params, state: Any, batch: Batch, rng: PRNGKeyArray
  ) -> tuple[Any, two_pass.Features]:
    """See RetrievalTask; with config.task.mlm_alpha, the teacher encodes all texts too."""
    encoded = self.apply(params, self.encode_all, batch, rng=rng)
    if not self.config.task.mlm_alpha:
      taught, features = None, self._teacher_features(state, batch)
    else:
      taught = self.apply(state.ema_params, self.encode_all, batch)
      features = {"teacher_image": taught[0][1], "teacher_text": taught[1][2]}
    return (encoded, taught), {"image": encoded[0][1], "text": encoded[1][2]} | features

  def rest(
    self, params: Params, state: Any, encoded: Any, drawn: Any, batch: Batch, rng: PRNGKeyArray
  ) -> tuple[Terms, Metrics]:
    """Computes the terms "itm", "mlm" and "prefix_lm", see ComparingTask."""
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
      alpha = self.ramped(self.config.task.mlm_alpha, state.step)
      soft = self.apply(state.ema_params, self._masked_logits, *taught[::2])
      words = (
        language_modeling.distilled_cross_entropy(words, batch["masked_label"], soft, alpha),
        words.argmax(-1) == batch["masked_label"],
      )
    losses = {"mlm": (*words, hidden), "prefix_lm": (*(x[:, :-1] for x in next_token), target)}
    terms |= {
      name: jnp.where(counted, loss, 0.0).sum() for name, (loss, _, counted) in losses.items()
    }
    return terms, metrics | {
      f"{name}_accuracy": ((right & counted).sum(dtype=jnp.float32), counted.sum(dtype=jnp.float32))
      for name, (_, right, counted) in losses.items()
    }

  def _masked_logits(self, module: MPlug, image: Images, masked: Text) -> Any:
    """Returns logits f32[B, L, V] of masked captions."""
    return module.mlm_logits(module.fuse(*masked, image[0])[1])
