"""Image-text retrieval: contrastive features and matching of fused pairs, with a momentum teacher and queues (paper section 4.2.3),
or without.

Shapes: B images and their texts, over the global batch; L text tokens, D width, E feature width; G images with P texts each.
"""

import jax
import jax.numpy as jnp

from mplug_jax.losses import contrastive, hard_negatives
from mplug_jax.parallel import batches, rules
from mplug_jax.tasks import base, two_pass
from mplug_jax.tasks.matching import (
  MATCH_LABELS,
  image_memory,
  match,
  match_score,
  match_scores,
  matching_losses,
)

_RERANK_SIMILARITY = ("none", "add", "likelihood")


_GROUP = 64  # rows that negatives are drawn from by default: at most so many


class RetrievalTask(two_pass.ComparingTask):
  """Two terms: "itc", cross-entropy of the similarities over batch and queues (both directions, halved), and "itm", cross-entropy of
  right and wrong pairs, two hard negatives for each right one.

  config.task: `queue` (columns; 0: the rows of a batch are compared with each other alone, without a teacher, and both sides of a
  pair learn from it), `alpha` and `ramp_steps` (weight of the teacher's targets, and the updates until it is reached),
  `match` and `contrast_chunk` (see contrastive.image_text_losses), `clamp_temperature` (docs/official.md item 23), `negatives` {group,
  greedy, ramp_steps} (item 24; group 0: the largest divisor of a microbatch up to 64; ramp_steps: updates until they are hard, from any
  rows on). The evaluator reads `rerank_k` and `rerank_texts`. `rerank_similarity`, "none", "add" or "likelihood": what a re-ranked pair's
  score has beside the logit of a match, see `match_scores`.

  Raises:
    ValueError: a value that cannot work; names its key.
  """

  def __init__(self, model, config, tokenizer):
    super().__init__(model, config, tokenizer)
    self.has_teacher = config.task.queue > 0
    if self.has_teacher and not (config.ema.decay and config.ema.use in ("teacher", "both")):
      raise ValueError(
        "Retrieval learns from a teacher: set config.ema.decay (0.995) and config.ema.use=teacher or both; or "
        "config.task.queue=0 and config.task.alpha=0, which need none."
      )
    if config.task.alpha and not self.has_teacher:
      raise ValueError(
        f"config.task.alpha={config.task.alpha} weighs the targets of a teacher, and config.task.queue=0 has none: set it "
        "to 0."
      )
    if config.optim.accumulate != "global":
      raise ValueError(
        f"config.optim.accumulate={config.optim.accumulate!r}: the contrastive loss compares all rows of the batch, so "
        "microbatches have no means of their own; set it to global."
      )
    if config.task.queue < 0:
      raise ValueError(
        f"config.task.queue={config.task.queue} must not be negative; 0 compares the rows of a batch alone."
      )
    if config.task.contrast_chunk < 0:
      raise ValueError(
        f"config.task.contrast_chunk={config.task.contrast_chunk} must not be negative; 0: all columns at once."
      )
    if config.task.rerank_k < 0:
      raise ValueError(
        f"config.task.rerank_k={config.task.rerank_k} must not be negative; 0 ranks by similarity alone."
      )
    if config.task.rerank_similarity not in _RERANK_SIMILARITY:
      raise ValueError(
        f"config.task.rerank_similarity={config.task.rerank_similarity!r} is not one of {', '.join(_RERANK_SIMILARITY)}."
      )
    if config.task.rerank_texts < 1:
      raise ValueError(f"config.task.rerank_texts={config.task.rerank_texts} must be at least 1.")
    parts = config.optim.microbatches
    self._group = config.task.negatives.group or _divisor(config.batch_size // parts)
    if config.task.negatives.ramp_steps and config.task.negatives.greedy:
      raise ValueError(
        f"config.task.negatives.ramp_steps={config.task.negatives.ramp_steps} makes drawn negatives harder and harder, and "
        "with config.task.negatives.greedy=True none are drawn: set one of the two to 0 or False."
      )
    if config.batch_size > 1:  # a single row has no negatives, and learns from the queue alone
      hard_negatives.check_group(
        self._group,
        config.batch_size // parts,
        "config.batch_size" + " / config.optim.microbatches" * (parts > 1),
      )

  def batch_spec(self, batch_size):
    shapes = dict(
      image=(base.image_shape(self.config, self.model.image_size), jnp.uint8),
      caption=((self.config.data.max_caption,), jnp.int32),
      id=((), jnp.int32),
      mask=((), bool),
      corrupt=((), bool),
      index=((), jnp.int32),
    )
    return {
      name: jax.ShapeDtypeStruct((batch_size,) + shape, dtype)
      for name, (shape, dtype) in shapes.items()
    }

  def init_extra(self):
    """The queues, always fresh (docs/official.md item 48); {} without."""
    return (
      {}
      if not self.has_teacher
      else contrastive.init_queues(self.model.embed_dim, self.config.task.queue)
    )

  def project(self, params):
    return contrastive.clamp_temperature(params) if self.config.task.clamp_temperature else params

  # ---- the model

  def _image(self, module, image):
    """u8[B, S, S, 3] -> (tokens dtype[B, N, D], unit vectors f32[B, E])."""
    tokens = base.encode_image(module, image)
    return tokens, base.contrastive_features(module, tokens, None, self.config.data.frames)[0]

  def _text(self, module, ids):
    """i32[B, L] -> (tokens dtype[B, L, D], bool[B, L], unit vectors f32[B, E])."""
    mask = ids != self.tokenizer.pad_id
    tokens = module.encode_text(ids, mask)
    return tokens, mask, base.contrastive_features(module, None, tokens)[1]

  def image_features(self, module, image):
    """Images, clips, or tokens f[B, N, D] of either -> unit vectors f32[B, E]."""
    return self._image(module, image)[1]

  def text_features(self, module, ids):
    """i32[B, L] -> unit vectors f32[B, E]."""
    return self._text(module, ids)[2]

  def encode(self, module, batch):
    """Batch -> `_image` of its images, `_text` of its captions."""
    return self._image(module, batch["image"]), self._text(module, batch["caption"])

  def forward(self, module, batch):
    """Batch -> logits f32[B, 3, 2] of `match`, without negatives: the third text is the first."""
    (image, _), (text, mask, _) = self.encode(module, batch)
    module.contrastive_temperature()
    return match(module, image, text, mask, image, text, mask)[0]

  # ---- the loss

  def _ids(self, batch):
    """i32[B]: rows with the same number are no negatives of each other."""
    return (
      batch["id"]
      if self.config.task.match == "image"
      else jnp.arange(len(batch["id"]), dtype=jnp.int32)
    )

  def _rows(self, batch):
    """(bool[B] rows that count, bool[B] those that have hard negatives)."""
    valid = batch["mask"] & ~batch["corrupt"]
    return valid, hard_negatives.present(self._ids(batch), valid, self._group)

  def loss_normalizers(self, batch, rng):
    """Pairs in the batch; right and wrong pairs that are matched."""
    valid, hard = self._rows(batch)
    return {"itc": valid.sum(dtype=jnp.float32), "itm": (valid + 2.0 * hard).sum()}

  @property
  def row_group(self):
    """Rows that draw their negatives among each other."""
    return self._group if self.config.batch_size > 1 else 1

  def encode_rows(self, params, state, batch, rng):
    """See base.ComparingTask; features "image" and "text", and the teacher's "teacher_image" and "teacher_text"."""
    image, text = encoded = self.apply(params, self.encode, batch, rng=rng)
    return encoded, {"image": image[1], "text": text[2]} | self._teacher_features(state, batch)

  def _teacher_features(self, state, batch):
    """Of `encode_rows`; {} without a teacher."""
    if not self.has_teacher:
      return {}
    image, text = self.apply(state.ema_params, self.encode, batch)
    return {"teacher_image": image[1], "teacher_text": text[2]}

  def ramped(self, value, step, updates=None):
    """`value`, reached linearly after so many updates, by default config.task.ramp_steps; 0: at once."""
    updates = self.config.task.ramp_steps if updates is None else updates
    return value * (jnp.minimum(1.0, step / updates) if updates else 1.0)

  def compare(self, params, state, features, batch, rng):
    """The term "itc", and which rows of their groups are hard negatives by its similarities; extra: the queues with this batch.

    See base.ComparingTask. `drawn`: {"image", "text": i32[B]}.
    """
    options, (valid, _), ids = self.config.task, self._rows(batch), self._ids(batch)
    temperature, alpha = params["temp"]["value"], self.ramped(options.alpha, state.step)
    image, text = features["image"], features["text"]
    teacher_image, teacher_text = (
      features.get("teacher_image", image),
      features.get("teacher_text", text),
    )
    i2t, t2i, nearest = contrastive.image_text_losses(
      image,
      text,
      teacher_image,
      teacher_text,
      batch["id"],
      valid,
      state.extra,
      temperature,
      alpha,
      options.match,
      options.contrast_chunk,
    )

    hardness = self.ramped(1.0, state.step, options.negatives.ramp_steps)

    def other(features, others, key):
      noise = (
        None
        if options.negatives.greedy
        else hard_negatives.gumbel_noise(key, len(ids), self._group)
      )
      return hard_negatives.draw(
        features, others, ids, valid, temperature / hardness, self._group, noise
      )

    image_rng, text_rng = jax.random.split(rng)
    drawn = {
      "image": other(text, teacher_image, image_rng),
      "text": other(image, teacher_text, text_rng),
    }
    metrics = {
      "itc_accuracy": _contrastive_accuracy(nearest, batch["id"], state.extra, valid),
      "temperature": (temperature, jnp.float32(1.0)),
      "corrupt_images": (batch["corrupt"].sum(dtype=jnp.float32), jnp.float32(1.0)),
    }
    terms = {"itc": jnp.where(valid, (i2t + t2i) / 2, 0.0).sum()}
    extra = (
      contrastive.enqueue(state.extra, teacher_image, teacher_text, batch["id"], valid)
      if self.has_teacher
      else state.extra
    )
    return terms, metrics, extra, drawn

  def pairs(self, image, text, drawn):
    """`_image`, `_text` and `compare`'s drawn negatives -> arguments of `match` behind the module."""
    (image, _), (text, mask, _) = image, text
    others = ((image, drawn["image"]), (text, drawn["text"]), (mask, drawn["text"]))
    return (
      image,
      text,
      mask,
      *(hard_negatives.take(x, numbers, self._group) for x, numbers in others),
    )

  def rest(self, params, state, encoded, drawn, batch, rng):
    """The term "itm". See base.ComparingTask."""
    logits = self.apply(params, match, *self.pairs(*encoded, drawn), rng=rng)[0]
    return self.matching(logits, batch)

  def matching(self, logits, batch):
    """The term "itm" of the logits of `match` -> (terms, metrics)."""
    valid, hard = self._rows(batch)
    counted = jnp.stack([valid, hard, hard], axis=1)
    right = (logits.argmax(-1) == MATCH_LABELS) & counted
    return (
      {"itm": jnp.where(counted, matching_losses(logits), 0.0).sum()},
      {"itm_accuracy": (right.sum(dtype=jnp.float32), counted.sum(dtype=jnp.float32))},
    )

  # ---- evaluation

  def predict_fns(self):
    """The last one reads what the two before it leave on the devices."""
    return {
      "embed_image": self._embed_image,
      "embed_texts": self._embed_texts,
      "image_memory": self._image_memory,
      "rerank": self._rerank,
    }

  def predict_sample(self, name, params, sample):
    """See base.Task.predict_sample."""
    if name != "rerank":
      return sample
    memory, texts = (
      jax.eval_shape(fn, params, sample) for fn in (self._image_memory, self._embed_texts)
    )
    pairs = jax.ShapeDtypeStruct(
      sample["index"].shape + (self.config.task.rerank_texts,), jnp.int32
    )
    return {"memory": memory, "texts": texts, "pair_text": pairs}

  def _embed_image(self, params, batch):
    """-> {"feature": f32[B, E]}."""
    return {"feature": self.apply(params, self._image, self.with_tokens(params, batch)["image"])[1]}

  def _embed_texts(self, params, batch):
    """All texts of a split at once, T of them -> {"tokens": dtype[T, L, D], "text_mask": bool[T, L], "feature": f32[T, E]}, whole on every
    device, since any image may be matched with any text.

    They are encoded in parts of config.eval.batch_size; T is a multiple of it, or smaller.
    """
    ids = batch["caption"]
    parts = max(1, len(ids) // self.config.eval.batch_size)
    out = jax.lax.map(
      lambda part: self.apply(params, self._text, part), batches.split_rows(ids, parts)
    )
    out = batches.join_rows(out, axes=None)
    return dict(zip(("tokens", "text_mask", "feature"), out))

  def _image_memory(self, params, batch):
    """-> `image_memory` of the images, and their "feature" f32[G, E]."""

    def memory(module, image):
      tokens, feature = self._image(module, image)
      return image_memory(module, tokens) | {"feature": feature}

    return jax.tree.map(
      rules.constrain, self.apply(params, memory, self.with_tokens(params, batch)["image"])
    )

  def _rerank(self, params, batch):
    """`_image_memory` of G images, the texts of `_embed_texts` and "pair_text" i32[G, P], the texts to match each image with ->
    {"score": f32[G, P]}."""

    def scores(part):
      return self.apply(
        params,
        match_scores,
        part["memory"],
        batch["texts"],
        part["pair_text"],
        params["temp"]["value"],
        self.config.task.rerank_similarity,
      )

    images = {name: batch[name] for name in ("memory", "pair_text")}
    if images["memory"]["tokens"] is None:
      return {"score": scores(images)}
    # Connected layers carry all tokens of an image for every text: one image a device at a time, whose activations stay small.
    count = len(images["pair_text"])
    parts = batches.split_rows(images, count // batches.batch_split(count))
    return {"score": batches.join_rows(jax.lax.map(scores, parts))}

  def match_pairs(self, params, batch):
    """Images and captions, row by row -> {"similarity": f32[B] product of the features, "probability": f32[B] of a match, "score": f32[B],
    see `match_scores`}."""

    def pairs(module, batch):
      (image, image_feature), (text, mask, text_feature) = self.encode(module, batch)
      _, fused = module.fuse(text, mask, image)
      return module.match_logits(fused), (image_feature * text_feature).sum(-1)

    logits, products = self.apply(params, pairs, batch)
    score = match_score(
      logits, products, params["temp"]["value"], self.config.task.rerank_similarity
    )
    return {"similarity": products, "probability": jax.nn.softmax(logits)[:, 1], "score": score}


def _contrastive_accuracy(nearest, ids, queues, valid):
  """(sum, count): how often the most similar column of batch and queue belongs to the row's image; both directions."""
  columns = jnp.concatenate([ids, queues["idx_queue"][0] if queues else ids[:0]])
  right = sum((columns[column] == ids) & valid for column in nearest.values())
  return right.sum(dtype=jnp.float32), 2.0 * valid.sum()


def _divisor(rows):
  """The largest divisor of `rows` up to _GROUP."""
  return max(n for n in range(1, min(rows, _GROUP) + 1) if rows % n == 0)
