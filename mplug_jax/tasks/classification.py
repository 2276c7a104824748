"""Classification of statements about images: SNLI-VE, NLVR2, text assignment, custom classes.

Shapes: B rows, N images of each, Q sentences about them (1 in evaluation), L tokens, D width,
C classes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray

from mplug_jax.arrays import Array
from mplug_jax.losses import language_modeling
from mplug_jax.models.mplug import MPlug
from mplug_jax.tasks import base
from mplug_jax.tasks.base import Batch, Metrics, Params, PredictFn, Terms


class ClassificationTask(base.Task):
  """Cross-entropy of the classes, from the first token of the fused text of every image.

  See MPlug.fuse_images.

  config.task:
    distill: {alpha, ramp_steps}, the share of the averaged model's distribution in the target, 0
      for none, and the number of updates in which it rises to that.
  config.data:
    labels: names of the classes.
    images_per_text: N.
    sentences_per_row: Q.

  Raises:
    ValueError: config.model, config.data and config.ema do not fit together.
  """

  separate_images = True

  def __init__(self, model: MPlug, config: Any, tokenizer: Any):
    super().__init__(model, config, tokenizer)
    labels = tuple(config.data.labels)
    classes, images = len(labels), config.data.images_per_text
    if len(set(labels)) < classes or not all(label.strip() for label in labels):
      raise ValueError(
        f"config.data.labels={labels!r} must be different names, none of them blank; records are "
        "found by them."
      )
    if model.classes != classes:
      raise ValueError(
        f"config.model.classes={model.classes}, but config.data.labels has {classes} classes; "
        "make them agree."
      )
    if model.pairing not in ("shared", "duplicated"):
      raise ValueError(f"config.model.pairing={model.pairing!r} is not one of shared, duplicated.")
    if model.pairing == "duplicated" and images != 2:
      raise ValueError(
        "config.model.pairing=duplicated has a layer for each of two images, but "
        f"config.data.images_per_text={images}."
      )
    if config.task.distill.alpha and not (
      config.ema.decay and config.ema.use in ("teacher", "both")
    ):
      raise ValueError(
        "config.task.distill.alpha needs a teacher: set config.ema.decay (0.995) and "
        "config.ema.use=teacher or both."
      )

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """See base.Task.batch_spec."""
    c, size = self.config.data, self.model.image_size
    shapes = dict(
      image=((c.images_per_text, size, size, 3), jnp.uint8),
      sentence=((c.sentences_per_row, c.max_text), jnp.int32),
      label=((c.sentences_per_row,), jnp.int32),
      mask=((), bool),
      corrupt=((), bool),
      index=((), jnp.int32),
    )
    return base.batch_structs(batch_size, shapes)

  def forward(self, module: MPlug, batch: Batch) -> Float[Array, "batch sentences classes"]:
    """Returns logits f32[B, Q, C]; every image and every sentence is encoded once."""
    image, ids = batch["image"], batch["sentence"].reshape(-1, batch["sentence"].shape[-1])
    image = base.encode_image(module, image.reshape((-1,) + image.shape[2:]))
    mask = ids != self.tokenizer.pad_id
    logits = module.class_logits(
      module.fuse_images(module.encode_text(ids, mask), mask, image, batch["image"].shape[1])
    )
    return logits.reshape(batch["label"].shape + (-1,))

  def explained_scores(self, module: MPlug, batch: Batch) -> Float[Array, "rows 1"]:
    """Returns the log-probability of the class "label" of a row's only sentence."""
    logits = jax.nn.log_softmax(self.forward(module, batch)[:, 0])
    return jnp.take_along_axis(logits, batch["label"], axis=-1)

  def loss_normalizers(self, batch: Batch, rng: PRNGKeyArray) -> Terms:
    """Returns the number of sentences with a known class."""
    return {"class": _counted(batch).sum()}

  def loss(
    self, params: Params, state: Any, batch: Batch, rng: PRNGKeyArray | None
  ) -> tuple[Terms, Metrics, Any]:
    """See base.Task.loss."""
    distill = self.config.task.distill
    label = jnp.maximum(batch["label"], 0)
    counted = _counted(batch)
    logits = self.apply(params, self.forward, batch, rng=rng)
    if distill.alpha:
      alpha = distill.alpha * jnp.minimum(1.0, (state.step + 1) / (distill.ramp_steps + 1))
      loss = language_modeling.distilled_cross_entropy(
        logits, label, self.apply(state.ema_params, self.forward, batch), alpha
      )
    else:
      loss = language_modeling.token_cross_entropy(logits, label)
    metrics = {
      "accuracy": (((logits.argmax(-1) == label) * counted).sum(), counted.sum()),
      "corrupt_rows": (batch["corrupt"].sum(dtype=jnp.float32), jnp.float32(1.0)),
    }
    return {"class": (loss * counted).sum()}, metrics, state.extra

  def predict_fns(self) -> dict[str, PredictFn]:
    """Returns "classify": {"probability": f32[B, C]} of the first sentence of each row."""
    return {
      "classify": lambda params, batch: {
        "probability": jax.nn.softmax(self.apply(params, self.forward, batch)[:, 0])
      }
    }


def _counted(batch: Batch) -> Float[Array, "batch sentences"]:
  """f32[B, Q]: 1 for sentences with a known class about readable images, else 0."""
  return ((batch["mask"] & ~batch["corrupt"])[:, None] & (batch["label"] >= 0)).astype(jnp.float32)
