"""Image-text retrieval: contrastive features and matching of fused pairs (paper section 4.2.3).

A momentum teacher and queues are optional. Shapes: B images and their texts, over the global batch;
L text tokens, D width, E feature width; G images with P texts each.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int32, PRNGKeyArray

from mplug_jax.arrays import Array
from mplug_jax.losses import contrastive, hard_negatives
from mplug_jax.models.mplug import MPlug
from mplug_jax.parallel import batches, rules
from mplug_jax.tasks import base, matching, two_pass
from mplug_jax.tasks.base import Batch, Metrics, Params, PredictFn, Terms
from mplug_jax.tasks.retrieval_checks import check_retrieval, default_group

# Encoded images: tokens dtype[B, N, D], unit vectors f32[B, E].
Images: TypeAlias = tuple[Any, Any]
# Encoded texts: tokens dtype[B, L, D], mask bool[B, L], unit vectors f32[B, E].
Texts: TypeAlias = tuple[Any, Any, Any]


class RetrievalTask(two_pass.ComparingTask):
  """Contrastive loss and matching loss.

  Loss terms:
    itc: cross-entropy of the similarities over batch and queues, mean of both directions.
    itm: cross-entropy of right and wrong pairs, two hard negatives for each right pair.

  config.task:
    queue: columns of the queues; 0 compares the rows of a batch only, without a teacher and with
      gradients to both sides of a pair.
    alpha, ramp_steps: weight of the teacher's targets, and updates until it is reached.
    match, contrast_chunk: see contrastive.image_text_losses.
    clamp_temperature: see docs/official.md item 23.
    negatives: {group, greedy, ramp_steps}, see docs/official.md item 24. group 0 is the largest
      divisor of a microbatch up to 64; over ramp_steps updates, draws go from uniform to hard.
    rerank_similarity: see matching.match_scores.
    rerank_k, rerank_texts: read by the evaluator.

  Raises:
    ValueError: invalid value; the message names its key.
  """

  zero_shot = (
    {
      "queue": 0,
      "alpha": 0.0,
      "ramp_steps": 0,
      "match": "image",
      "contrast_chunk": 0,
      "clamp_temperature": True,
      "negatives": {"group": 0, "greedy": False, "ramp_steps": 0},
      "rerank_k": 32,
      "rerank_texts": 16,
      "rerank_similarity": "none",
    },
    {"max_words": 30, "max_caption": 30},
  )

  def __init__(self, model: MPlug, config: Any, tokenizer: Any):
    super().__init__(model, config, tokenizer)
    self.has_teacher = config.task.queue > 0
    check_retrieval(config)
    parts = config.optim.microbatches
    self._group = config.task.negatives.group or default_group(config.batch_size // parts)
    if config.batch_size > 1:  # A single row has no negatives and learns from the queue only.
      hard_negatives.check_group(
        self._group,
        config.batch_size // parts,
        "config.batch_size / config.optim.microbatches" if parts > 1 else "config.batch_size",
      )

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """See base.Task.batch_spec."""
    shapes = dict(
      image=(base.image_shape(self.config, self.model.image_size), jnp.uint8),
      caption=((self.config.data.max_caption,), jnp.int32),
      id=((), jnp.int32),
      mask=((), bool),
      corrupt=((), bool),
      index=((), jnp.int32),
    )
    return base.batch_structs(batch_size, shapes)

  def init_extra(self) -> dict[str, Any]:
    """Returns fresh queues (docs/official.md item 48), or {} without queues."""
    if not self.has_teacher:
      return {}
    return contrastive.init_queues(self.model.embed_dim, self.config.task.queue)

  def project(self, params: Params) -> Params:
    """Clamps the temperature if config.task.clamp_temperature is set."""
    return contrastive.clamp_temperature(params) if self.config.task.clamp_temperature else params

  # ---- the model

  def _image(self, module: MPlug, image: Any) -> Images:
    """Encodes images u8[B, S, S, 3], clips u8[B, F, S, S, 3] or tokens f[B, N, D]."""
    tokens = base.encode_image(module, image)
    return tokens, base.contrastive_features(module, tokens, None, self.config.data.frames)[0]

  def _text(self, module: MPlug, ids: Any) -> Texts:
    """Encodes texts i32[B, L]."""
    mask = ids != self.tokenizer.pad_id
    tokens = module.encode_text(ids, mask)
    return tokens, mask, base.contrastive_features(module, None, tokens)[1]

  def image_features(self, module: MPlug, image: Any) -> Float[Array, "batch features"]:
    """Returns unit vectors f32[B, E] of images, clips, or their tokens f[B, N, D]."""
    return self._image(module, image)[1]

  def text_features(self, module: MPlug, ids: Any) -> Float[Array, "batch features"]:
    """Returns unit vectors f32[B, E] of texts i32[B, L]."""
    return self._text(module, ids)[2]

  def encode(self, module: MPlug, batch: Batch) -> tuple[Images, Texts]:
    """Encodes the images and captions of a batch."""
    return self._image(module, batch["image"]), self._text(module, batch["caption"])

  def forward(self, module: MPlug, batch: Batch) -> Any:
    """Returns logits f32[B, 3, 2] of `match` with each pair itself in place of the negatives."""
    (image, _), (text, mask, _) = self.encode(module, batch)
    module.contrastive_temperature()
    return matching.match(module, image, text, mask, image, text, mask)[0]

  def explained_scores(self, module: MPlug, batch: Batch) -> Float[Array, "rows 1"]:
    """Returns the log-odds that "caption" describes the image."""
    (image, _), (text, mask, _) = self.encode(module, batch)
    logits = module.match_logits(module.fuse(text, mask, image)[1])
    return logits[:, 1:] - logits[:, :1]

  # ---- the loss

  def _ids(self, batch: Batch) -> Any:
    """i32[B]: rows with the same number are no negatives of each other."""
    if self.config.task.match == "image":
      return batch["id"]
    return jnp.arange(len(batch["id"]), dtype=jnp.int32)

  def _rows(self, batch: Batch) -> tuple[Any, Any]:
    """(bool[B] rows that count, bool[B] rows that have hard negatives)."""
    valid = batch["mask"] & ~batch["corrupt"]
    return valid, hard_negatives.present(self._ids(batch), valid, self._group)

  def loss_normalizers(self, batch: Batch, rng: PRNGKeyArray) -> Terms:
    """Returns the number of pairs, and of right and wrong pairs that are matched."""
    valid, hard = self._rows(batch)
    return {"itc": valid.sum(dtype=jnp.float32), "itm": (valid + 2.0 * hard).sum()}

  @property
  def row_group(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] read-only
    """Number of consecutive rows that draw their negatives among each other."""
    return self._group if self.config.batch_size > 1 else 1

  def encode_rows(
    self, params: Params, state: Any, batch: Batch, rng: PRNGKeyArray
  ) -> tuple[Any, two_pass.Features]:
    """See ComparingTask; with a teacher also features "teacher_image" and "teacher_text"."""
    image, text = encoded = self.apply(params, self.encode, batch, rng=rng)
    return encoded, {"image": image[1], "text": text[2]} | self._teacher_features(state, batch)

  def _teacher_features(self, state: Any, batch: Batch) -> two_pass.Features:
    """Features of the teacher; {} without one."""
    if not self.has_teacher:
      return {}
    image, text = self.apply(state.ema_params, self.encode, batch)
    return {"teacher_image": image[1], "teacher_text": text[2]}

  def ramped(self, value: float, step: Any, updates: int | None = None) -> Any:
    """Linear ramp from 0 to `value`.

    Args:
      value: value at the end.
      step: i32[], current update.
      updates: length of the ramp, by default config.task.ramp_steps; 0 returns `value`.
    """
    updates = self.config.task.ramp_steps if updates is None else updates
    return value * (jnp.minimum(1.0, step / updates) if updates else 1.0)

  def compare(
    self,
    params: Params,
    state: Any,
    features: two_pass.Features,
    batch: Batch,
    rng: PRNGKeyArray,
  ) -> tuple[Terms, Metrics, Any, dict[str, Any]]:
    """Computes the term "itc" and draws hard negatives by its similarities.

    See ComparingTask. The extra state is the queues with this batch; the last result holds the
    drawn rows, {"image", "text": i32[B]}.
    """
    options = self.config.task
    valid, _ = self._rows(batch)
    temperature = params["temp"]["value"]
    image = features["image"]
    text = features["text"]
    teacher_image = features.get("teacher_image", image)
    teacher_text = features.get("teacher_text", text)
    i2t, t2i, nearest = contrastive.image_text_losses(
      image,
      text,
      teacher_image,
      teacher_text,
      batch["id"],
      valid,
      state.extra,
      temperature,
      self.ramped(options.alpha, state.step),
      options.match,
      options.contrast_chunk,
    )
    scale = temperature / self.ramped(1.0, state.step, options.negatives.ramp_steps)
    image_rng, text_rng = jax.random.split(rng)
    drawn = {
      "image": self._draw_negatives(text, teacher_image, batch, scale, image_rng),
      "text": self._draw_negatives(image, teacher_text, batch, scale, text_rng),
    }
    metrics = {
      "itc_accuracy": matching.contrastive_accuracy(nearest, batch["id"], state.extra, valid),
      "temperature": (temperature, jnp.float32(1.0)),
      "corrupt_images": (batch["corrupt"].sum(dtype=jnp.float32), jnp.float32(1.0)),
    }
    terms = {"itc": jnp.where(valid, (i2t + t2i) / 2, 0.0).sum()}
    extra = state.extra
    if self.has_teacher:
      extra = contrastive.enqueue(extra, teacher_image, teacher_text, batch["id"], valid)
    return terms, metrics, extra, drawn

  def _draw_negatives(
    self,
    features: Float[Array, "batch features"],
    others: Float[Array, "batch features"],
    batch: Batch,
    temperature: Any,
    rng: PRNGKeyArray,
  ) -> Int32[Array, " batch"]:
    """Draws a hard negative among `others` for each row, see hard_negatives.draw."""
    valid, _ = self._rows(batch)
    ids = self._ids(batch)
    noise = None
    if not self.config.task.negatives.greedy:
      noise = hard_negatives.gumbel_noise(rng, len(ids), self._group)
    return hard_negatives.draw(features, others, ids, valid, temperature, self._group, noise)

  def pairs(self, images: Images, texts: Texts, drawn: dict[str, Any]) -> tuple[Any, ...]:
    """Returns the arguments of `match` after the module.

    Args:
      images: encoded images.
      texts: encoded texts.
      drawn: negatives from `compare`.
    """
    image, _ = images
    text, mask, _ = texts
    others = ((image, drawn["image"]), (text, drawn["text"]), (mask, drawn["text"]))
    return (
      image,
      text,
      mask,
      *(hard_negatives.take(x, numbers, self._group) for x, numbers in others),
    )

  def rest(
    self, params: Params, state: Any, encoded: Any, drawn: Any, batch: Batch, rng: PRNGKeyArray
  ) -> tuple[Terms, Metrics]:
    """Computes the term "itm", see ComparingTask."""
    images, texts = encoded
    logits = self.apply(params, matching.match, *self.pairs(images, texts, drawn), rng=rng)[0]
    return self.matching(logits, batch)

  def matching(self, logits: Float[Array, "batch 3 2"], batch: Batch) -> tuple[Terms, Metrics]:
    """Returns the term "itm" and its metrics from logits f32[B, 3, 2] of `match`."""
    valid, hard = self._rows(batch)
    counted = jnp.stack([valid, hard, hard], axis=1)
    right = (logits.argmax(-1) == matching.MATCH_LABELS) & counted
    return (
      {"itm": jnp.where(counted, matching.matching_losses(logits), 0.0).sum()},
      {"itm_accuracy": (right.sum(dtype=jnp.float32), counted.sum(dtype=jnp.float32))},
    )

  # ---- evaluation

  def predict_fns(self) -> dict[str, PredictFn]:
    """Returns encoders of images and texts, and "rerank", which reads their results."""
    return {
      "embed_image": self._embed_image,
      "embed_texts": self._embed_texts,
      "image_memory": self._image_memory,
      "rerank": self._rerank,
    }

  def predict_sample(self, name: str, params: Params, sample: Batch) -> Batch:
    """See base.Task.predict_sample."""
    if name != "rerank":
      return sample
    memory = jax.eval_shape(self._image_memory, params, sample)
    texts = jax.eval_shape(self._embed_texts, params, sample)
    pairs = jax.ShapeDtypeStruct(
      sample["index"].shape + (self.config.task.rerank_texts,), jnp.int32
    )
    return {"memory": memory, "texts": texts, "pair_text": pairs}

  def _embed_image(self, params: Params, batch: Batch) -> dict[str, Any]:
    """Returns {"feature": f32[B, E]}."""
    return {"feature": self.apply(params, self._image, self.with_tokens(params, batch)["image"])[1]}

  def _embed_texts(self, params: Params, batch: Batch) -> dict[str, Any]:
    """Encodes all T texts of a split, in parts of config.eval.batch_size.

    The result is replicated, since any image may be matched with any text. T is a multiple of
    config.eval.batch_size, or smaller.

    Returns:
      {"tokens": dtype[T, L, D], "text_mask": bool[T, L], "feature": f32[T, E]}.
    """
    ids = batch["caption"]
    parts = max(1, len(ids) // self.config.eval.batch_size)
    out = jax.lax.map(
      lambda part: self.apply(params, self._text, part), batches.split_rows(ids, parts)
    )
    out = batches.join_rows(out, axes=None)
    return dict(zip(("tokens", "text_mask", "feature"), out))

  def _image_memory(self, params: Params, batch: Batch) -> dict[str, Any]:
    """Returns `image_memory` of the images and their "feature" f32[G, E]."""

    def memory(module, image):
      tokens, feature = self._image(module, image)
      return matching.image_memory(module, tokens) | {"feature": feature}

    return jax.tree.map(
      rules.constrain, self.apply(params, memory, self.with_tokens(params, batch)["image"])
    )

  def _rerank(self, params: Params, batch: Batch) -> dict[str, Any]:
    """Scores pairs of images and texts.

    Args:
      params: parameters.
      batch: "memory", from `_image_memory` of G images; "texts", from `_embed_texts`; "pair_text"
        i32[G, P], the texts to match each image with.

    Returns:
      {"score": f32[G, P]}.
    """

    def scores(part):
      return self.apply(
        params,
        matching.match_scores,
        part["memory"],
        batch["texts"],
        part["pair_text"],
        params["temp"]["value"],
        self.config.task.rerank_similarity,
      )

    images = {name: batch[name] for name in ("memory", "pair_text")}
    if images["memory"]["tokens"] is None:
      return {"score": scores(images)}
    # Connected layers hold all tokens of an image for every text: one image per device at a time
    # keeps the activations small.
    count = len(images["pair_text"])
    parts = batches.split_rows(images, count // batches.batch_split(count))
    return {"score": batches.join_rows(jax.lax.map(scores, parts))}

  def match_pairs(self, params: Params, batch: Batch) -> dict[str, Any]:
    """Matches each image with the caption of its row.

    Args:
      params: parameters.
      batch: "image" and "caption".

    Returns:
      {"similarity": f32[B] product of the features, "probability": f32[B] of a match,
      "score": f32[B], see matching.match_scores}.
    """

    def pairs(module, batch):
      (image, image_feature), (text, mask, text_feature) = self.encode(module, batch)
      _, fused = module.fuse(text, mask, image)
      return module.match_logits(fused), (image_feature * text_feature).sum(-1)

    logits, products = self.apply(params, pairs, batch)
    score = matching.match_score(
      logits, products, params["temp"]["value"], self.config.task.rerank_similarity
    )
    return {"similarity": products, "probability": jax.nn.softmax(logits)[:, 1], "score": score}
