"""Visual grounding: the box of a phrase, generated as four location tokens.

Shapes: B images, E phrases about each, R = B * E rows, L phrase tokens, V vocabulary, S pixels of the canvas. A box is centre x,
centre y, width and height as shares of the canvas unless corners are said.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.data import boxes
from mplug_jax.data.text import sentencepiece
from mplug_jax.decoding import beam_search
from mplug_jax.losses import language_modeling
from mplug_jax.models.mplug import decoding_fns
from mplug_jax.tasks import base

COORDINATES = 4
BOX_WEIGHTS = ("own", "batch", "none")
_LOWERED = -10_000.0  # added to the logits of everything but locations
_LARGEST_ERROR = 5.0
_EVAL_NORMALISATIONS = ("clip", "imagenet")
_IMAGENET_MEAN = tuple(255 * x for x in (0.485, 0.456, 0.406))
_IMAGENET_STD = tuple(255 * x for x in (0.229, 0.224, 0.225))
_FIRST_UNUSED = 339  # of BERT's vocabulary: [unused339] begins a box, [unused340] is the first bin


def location_ids(tokenizer, bins):
  """-> (id of the token that begins a box, i32[bins + 1] ids of the bins), by name.

  A fitted tokenizer has names of its own for them, BERT's vocabulary has unused places.

  Raises:
    ValueError: it has neither.
  """
  unused = tuple(f"[unused{_FIRST_UNUSED + i}]" for i in range(bins + 2))
  for names in (sentencepiece.location_names(bins + 1), unused):
    try:
      first, *rest = map(tokenizer.token_id, names)
    except ValueError:
      continue
    return first, np.array(rest, np.int32)
  raise ValueError(
    f"The tokenizer has no location tokens for config.task.bins={bins}: fit one with config.tokenizer.locations="
    f"{bins + 1}, or give a vocabulary with {unused[0]} to {unused[-1]}, as BERT's is for up to 336 bins and more."
  )


def lower_words(logits, ids):
  """f32[..., V] with 10,000 taken from the logits of all tokens but `ids`."""
  keep = np.zeros(logits.shape[-1], bool)
  keep[ids] = True
  return logits + jnp.where(keep, 0.0, _LOWERED)


def coordinate_weights(predicted, truth):
  """|predicted - truth| of boxes f32[R, 4], at most 5."""
  return jnp.minimum(jnp.abs(predicted - truth), _LARGEST_ERROR)


def overlap_weights(predicted, truth):
  """1 - generalised IoU of boxes f32[R, 4] -> f32[R]."""
  return 1.0 - boxes.generalised_iou(boxes.to_corners(predicted), boxes.to_corners(truth))


def box_losses(token_loss, predicted, truth, valid, how):
  """Loss of each box: the mean over its four tokens, each weighted by how wrong the predicted box is.

  A prediction that is right has a weight near 0 and teaches next to nothing.

  Args:
    token_loss: f32[R, 4] cross-entropy. predicted: f32[R, 4], without gradient. truth: f32[R, 4]. valid: bool[R].
    how: "own", every box by its own prediction; "batch", by the mean weight of all valid boxes of the batch (or microbatch),
      which is what the released code computes (docs/official.md item 11); "none", all alike.

  Returns:
    f32[R], 0 where not valid.
  """
  if how != "none":
    weight = coordinate_weights(predicted, truth) * overlap_weights(predicted, truth)[:, None]
    if how == "batch":
      weight = jnp.where(valid[:, None], weight, 0.0).sum(0) / jnp.maximum(valid.sum(), 1)
    token_loss = token_loss * weight
  return jnp.where(valid, token_loss.mean(-1), 0.0)


def in_image_pixels(box, placed, size, canvas):
  """Boxes on the canvas -> corners in pixels of the image it shows, cut off at the edges of the canvas.

  Args:
    box: f32[B, E, 4]. placed: i32[B, 4], left, top, right, bottom of the image on the canvas. size: i32[B, 2], its width and height.
    canvas: S.
  """
  corners = jnp.clip(boxes.to_corners(box), 0.0, 1.0) * canvas
  placed = placed.astype(jnp.float32)[:, None]
  low, extent = placed[..., :2], jnp.maximum(placed[..., 2:] - placed[..., :2], 1.0)
  return (corners - jnp.tile(low, 2)) * jnp.tile(size.astype(jnp.float32)[:, None] / extent, 2)


class GroundingTask(base.Task):
  """Cross-entropy of the location tokens, weighted by the error of the predicted box.

  config.task: `bins` and `rounding` (docs/official.md item 14), `box_weights` (see `box_losses`), `eval_normalisation` ("clip", or
  "imagenet" as the official evaluation, item 13).
  """

  def __init__(self, model, config, tokenizer):
    super().__init__(model, config, tokenizer)
    for name, known in (
      ("box_weights", BOX_WEIGHTS),
      ("eval_normalisation", _EVAL_NORMALISATIONS),
      ("rounding", boxes.ROUNDINGS),
    ):
      if config.task[name] not in known:
        raise ValueError(
          f"config.task.{name}={config.task[name]!r} is not one of {', '.join(known)}."
        )
    self._bins = config.task.bins
    self._begin, self._locations = location_ids(tokenizer, self._bins)

  def batch_spec(self, batch_size):
    c, size = self.config.data, self.model.image_size
    count = c.expressions_per_image
    shapes = dict(
      image=((size, size, 3), jnp.uint8),
      placed=((4,), jnp.int32),
      size=((2,), jnp.int32),
      phrase=((count, c.max_phrase), jnp.int32),
      box=((count, COORDINATES), jnp.float32),
      valid=((count,), bool),
      mask=((), bool),
      corrupt=((), bool),
      index=((), jnp.int32),
    )
    return {
      name: jax.ShapeDtypeStruct((batch_size,) + shape, dtype)
      for name, (shape, dtype) in shapes.items()
    }

  def _normalise(self, image, placed, imagenet):
    """u8[B, S, S, 3] -> f32[B, S, S, 3], exactly 0 around the image, as in the official code."""
    normal = base.normalise(image)
    if imagenet:
      normal = (image.astype(jnp.float32) - jnp.asarray(_IMAGENET_MEAN)) / jnp.asarray(
        _IMAGENET_STD
      )
    at, placed = jnp.arange(image.shape[1]), placed[:, :, None]
    columns = (at >= placed[:, 0]) & (at < placed[:, 2])
    rows = (at >= placed[:, 1]) & (at < placed[:, 3])
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], normal, 0.0)

  def encode_image(self, module, batch, imagenet=False):
    """Batch -> tokens f[B, N, D]; a batch may have them as its image."""
    image = batch["image"]
    return (
      image
      if image.ndim == 3
      else module.encode_image(self._normalise(image, batch["placed"], imagenet))
    )

  def evaluated_image(self, module, batch):
    """`encode_image` with the pixels normalised as for evaluation."""
    return self.encode_image(module, batch, self.config.task.eval_normalisation == "imagenet")

  def encode(self, module, batch, imagenet=False):
    """Batch -> Memory of R rows: [image; phrase] after fusion. The image is encoded once for its phrases."""
    image = self.encode_image(module, batch, imagenet)
    ids = batch["phrase"].reshape(-1, batch["phrase"].shape[-1])
    mask = ids != self.tokenizer.pad_id
    image, text = module.fuse(module.encode_text(ids, mask), mask, image)
    return module.memory(image, text, mask)

  def _quantise(self, box):
    """Shares f32[..., 4] -> bins i32[..., 4]."""
    return boxes.quantise(box, self._bins, self.config.task.rounding)

  def _targets(self, batch):
    """i32[R, 4] token ids of the boxes."""
    return jnp.asarray(self._locations)[self._quantise(batch["box"].reshape(-1, COORDINATES))]

  def forward(self, module, batch):
    """Batch -> logits f32[R, 4, V] of the location tokens under teacher forcing, those of words lowered."""
    targets = self._targets(batch)
    ids = jnp.concatenate(
      [jnp.full((len(targets), 1), self._begin, jnp.int32), targets[:, :-1]], axis=1
    )
    return lower_words(
      module.decode(ids, jnp.ones(ids.shape, bool), self.encode(module, batch)), self._locations
    )

  def loss_normalizers(self, batch, rng):
    """Boxes in the batch."""
    return {"box": batch["valid"].sum(dtype=jnp.float32)}

  def loss(self, params, state, batch, rng):
    """See base.Task.loss."""
    logits = self.apply(params, self.forward, batch, rng=rng)
    targets, valid = self._targets(batch), batch["valid"].reshape(-1)
    truth = batch["box"].reshape(-1, COORDINATES)
    # Lowered logits never win, so the best token is the best location.
    best = logits[..., self._locations].argmax(-1)
    predicted = boxes.dequantise(best, self._bins)
    total = box_losses(
      language_modeling.token_cross_entropy(logits, targets),
      predicted,
      truth,
      valid,
      self.config.task.box_weights,
    ).sum()
    count = valid.sum(dtype=jnp.float32)
    right = (jnp.asarray(self._locations)[best] == targets).mean(-1)
    overlap = boxes.iou(boxes.to_corners(predicted), boxes.to_corners(truth))
    metrics = {
      "token_accuracy": (jnp.where(valid, right, 0.0).sum(), count),
      "iou": (jnp.where(valid, overlap, 0.0).sum(), count),
      "corrupt_images": (batch["corrupt"].sum(dtype=jnp.float32), jnp.float32(1.0)),
    }
    return {"box": total}, metrics, state.extra

  def predict_fns(self):
    """ "locate": the most probable box of every phrase."""
    return {"locate": self._locate}

  def _locate(self, params, batch):
    """Greedy search of four location tokens.

    Returns:
      {"box": f32[B, E, 4] corners in pixels of the original image, "bins": i32[B, E, 4], "score": f32[B, E] log-probability,
      "nearest": f32[B, E, 4], the true box as its own tokens give it back; "size": i32[B, 2], the batch's}.
    """
    rows = batch["phrase"].shape[:2]
    memory = self.apply(params, self.encode, self.with_tokens(params, batch, self.evaluated_image))
    cache = self.apply(params, type(self.model).init_cache, memory, 1, COORDINATES + 1)
    step, _ = decoding_fns(self.model, params)

    def locations_only(cache, tokens, position):
      logits, cache = step(cache, tokens, position)
      return lower_words(logits, self._locations), cache

    prompt = jnp.full((memory.rows, 1), self._begin, jnp.int32)
    # length_penalty 0: the score is the plain sum of log-probabilities.
    best = beam_search.greedy(
      locations_only,
      cache,
      prompt,
      jnp.ones((memory.rows,), jnp.int32),
      max_length=COORDINATES,
      eos_id=self.tokenizer.eos_id,
      pad_id=self.tokenizer.pad_id,
      length_penalty=0.0,
    )
    number_of = np.zeros(self.model.vocab_size, np.int32)
    number_of[self._locations] = np.arange(len(self._locations))
    bins = jnp.asarray(number_of)[best.tokens[:, 0, 1:]].reshape(rows + (COORDINATES,))

    def pixels(numbers):
      return in_image_pixels(
        boxes.dequantise(numbers, self._bins), batch["placed"], batch["size"], self.model.image_size
      )

    return {
      "box": pixels(bins),
      "bins": bins,
      "score": best.scores[:, 0].reshape(rows),
      "nearest": pixels(self._quantise(batch["box"])),
      "size": batch["size"],
    }
