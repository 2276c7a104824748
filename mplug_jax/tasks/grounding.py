"""Visual grounding: the box of a phrase, generated as four location tokens.

Shapes: B images, E phrases about each, R = B * E rows, L phrase tokens, V vocabulary, S pixels of
the canvas. A box is center x, center y, width and height as fractions of the canvas, unless a
function names corners.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32, PRNGKeyArray

from mplug_jax.arrays import Array
from mplug_jax.data import boxes
from mplug_jax.data.text import sentencepiece
from mplug_jax.decoding import beam_search
from mplug_jax.losses import language_modeling
from mplug_jax.models.bert import Memory
from mplug_jax.models.mplug import MPlug, decoding_fns
from mplug_jax.tasks import base
from mplug_jax.tasks.base import Batch, Metrics, Params, PredictFn, Terms

COORDINATES = 4
BOX_WEIGHTS = ("per_example", "batch", "none")
_LOWERED = -10_000.0  # Added to the logits of all tokens but locations.
_LARGEST_ERROR = 5.0
_EVAL_NORMALIZATIONS = ("clip", "imagenet")
_IMAGENET_MEAN = tuple(255 * x for x in (0.485, 0.456, 0.406))
_IMAGENET_STD = tuple(255 * x for x in (0.229, 0.224, 0.225))
# In BERT's vocabulary, [unused339] begins a box and [unused340] is the first bin.
_FIRST_UNUSED = 339


def location_ids(tokenizer: Any, bins: int) -> tuple[int, np.ndarray]:
  """Looks up the location tokens.

  A fitted tokenizer has named location tokens; in BERT's vocabulary, unused tokens serve.

  Args:
    tokenizer: see data/text/tokenizer_base.py.
    bins: number of bins of a coordinate, less one.

  Returns:
    Id of the token that begins a box, and ids i32[bins + 1] of the bins.

  Raises:
    ValueError: the tokenizer has neither.
  """
  unused = tuple(f"[unused{_FIRST_UNUSED + i}]" for i in range(bins + 2))
  for names in (sentencepiece.location_names(bins + 1), unused):
    try:
      first, *rest = map(tokenizer.token_id, names)
    except ValueError:
      continue
    return first, np.array(rest, np.int32)
  raise ValueError(
    f"The tokenizer has no location tokens for config.task.bins={bins}: fit one with "
    f"config.tokenizer.locations={bins + 1}, or use a vocabulary with {unused[0]} to {unused[-1]}, "
    "as BERT's has for 336 bins and more."
  )


def lower_words(
  logits: Float[Array, "*rows vocabulary"], ids: np.ndarray
) -> Float[Array, "*rows vocabulary"]:
  """Subtracts 10,000 from the logits f32[..., V] of all tokens but `ids`."""
  keep = np.zeros(logits.shape[-1], bool)
  keep[ids] = True
  return logits + jnp.where(keep, 0.0, _LOWERED)


def coordinate_weights(predicted: Any, truth: Any) -> Float[Array, "rows 4"]:
  """Returns |predicted - truth| of boxes f32[R, 4], at most 5."""
  return jnp.minimum(jnp.abs(predicted - truth), _LARGEST_ERROR)


def overlap_weights(predicted: Any, truth: Any) -> Float[Array, " rows"]:
  """Returns 1 - generalized IoU f32[R] of boxes f32[R, 4]."""
  return 1.0 - boxes.generalized_iou(boxes.to_corners(predicted), boxes.to_corners(truth))


def box_losses(
  token_loss: Any, predicted: Any, truth: Any, valid: Any, how: str
) -> Float[Array, " rows"]:
  """Loss of each box: the mean over its four tokens, weighted by the error of the predicted box.

  The weight of a correct prediction is near 0, and so is its gradient.

  Args:
    token_loss: cross-entropy f32[R, 4].
    predicted: boxes f32[R, 4], without gradient.
    truth: boxes f32[R, 4].
    valid: bool[R].
    how: "per_example" weights a box by its own error; "batch" by the mean weight of all valid
      boxes of the batch or microbatch, as the released code (docs/official.md item 11); "none" not
      at all.

  Returns:
    f32[R], 0 for rows that are not valid.
  """
  if how != "none":
    weight = coordinate_weights(predicted, truth) * overlap_weights(predicted, truth)[:, None]
    if how == "batch":
      weight = jnp.where(valid[:, None], weight, 0.0).sum(0) / jnp.maximum(valid.sum(), 1)
    token_loss = token_loss * weight
  return jnp.where(valid, token_loss.mean(-1), 0.0)


def in_image_pixels(
  box: Any, placed: Any, size: Any, canvas: int
) -> Float[Array, "batch phrases 4"]:
  """Converts boxes on the canvas to corners in pixels of the original image.

  Args:
    box: f32[B, E, 4], clipped to the canvas.
    placed: i32[B, 4], left, top, right and bottom of the image on the canvas, pixels.
    size: i32[B, 2], width and height of the original image, pixels.
    canvas: height and width S of the canvas, pixels.

  Returns:
    Corners f32[B, E, 4].
  """
  corners = jnp.clip(boxes.to_corners(box), 0.0, 1.0) * canvas
  placed = placed.astype(jnp.float32)[:, None]
  low, extent = placed[..., :2], jnp.maximum(placed[..., 2:] - placed[..., :2], 1.0)
  return (corners - jnp.tile(low, 2)) * jnp.tile(size.astype(jnp.float32)[:, None] / extent, 2)


class GroundingTask(base.Task):
  """Cross-entropy of the location tokens, weighted by the error of the predicted box.

  config.task:
    bins, rounding: see docs/official.md item 14.
    box_weights: see `box_losses`.
    eval_normalization: "clip", or "imagenet" as the official evaluation (docs/official.md item 13).

  Raises:
    ValueError: unknown value of one of these, or a tokenizer without location tokens.
  """

  def __init__(self, model: MPlug, config: Any, tokenizer: Any):
    super().__init__(model, config, tokenizer)
    for name, known in (
      ("box_weights", BOX_WEIGHTS),
      ("eval_normalization", _EVAL_NORMALIZATIONS),
      ("rounding", boxes.ROUNDINGS),
    ):
      if config.task[name] not in known:
        raise ValueError(
          f"config.task.{name}={config.task[name]!r} is not one of {', '.join(known)}."
        )
    self._bins = config.task.bins
    self._begin, self._locations = location_ids(tokenizer, self._bins)

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """See base.Task.batch_spec."""
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
    return base.batch_structs(batch_size, shapes)

  def _normalize(self, image: Any, placed: Any, imagenet: bool) -> Any:
    """u8[B, S, S, 3] -> f32[B, S, S, 3], exactly 0 around the image, as in the official code."""
    normal = base.normalize(image)
    if imagenet:
      normal = (image.astype(jnp.float32) - jnp.asarray(_IMAGENET_MEAN)) / jnp.asarray(
        _IMAGENET_STD
      )
    at, placed = jnp.arange(image.shape[1]), placed[:, :, None]
    columns = (at >= placed[:, 0]) & (at < placed[:, 2])
    rows = (at >= placed[:, 1]) & (at < placed[:, 3])
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], normal, 0.0)

  def encode_image(
    self, module: MPlug, batch: Batch, imagenet: bool = False
  ) -> Float[Array, "batch tokens width"]:
    """Encodes the images of a batch.

    Args:
      module: bound model.
      batch: pixels and "placed", or tokens f[B, N, D], as "image".
      imagenet: normalize pixels by ImageNet's statistics instead of CLIP's.

    Returns:
      f[B, N, D].
    """
    image = batch["image"]
    if image.ndim == 3:
      return image
    return module.encode_image(self._normalize(image, batch["placed"], imagenet))

  def evaluated_image(self, module: MPlug, batch: Batch) -> Float[Array, "batch tokens width"]:
    """Returns `encode_image` with config.task.eval_normalization."""
    return self.encode_image(module, batch, self.config.task.eval_normalization == "imagenet")

  def encode(self, module: MPlug, batch: Batch, imagenet: bool = False) -> Memory:
    """Returns a Memory of R rows: [image; phrase] after fusion; images are encoded once.

    Args:
      module: bound model.
      batch: see `encode_image`; "phrase" i32[B, E, L].
      imagenet: see `encode_image`.
    """
    image = self.encode_image(module, batch, imagenet)
    ids = batch["phrase"].reshape(-1, batch["phrase"].shape[-1])
    mask = ids != self.tokenizer.pad_id
    image, text = module.fuse(module.encode_text(ids, mask), mask, image)
    return module.memory(image, text, mask)

  def _quantize(self, box: Any) -> Any:
    """Fractions f32[..., 4] -> bins i32[..., 4]."""
    return boxes.quantize(box, self._bins, self.config.task.rounding)

  def _targets(self, batch: Batch) -> Int32[Array, "rows 4"]:
    """i32[R, 4] token ids of the boxes."""
    return jnp.asarray(self._locations)[self._quantize(batch["box"].reshape(-1, COORDINATES))]

  def forward(self, module: MPlug, batch: Batch) -> Float[Array, "rows 4 vocabulary"]:
    """Returns logits f32[R, 4, V] under teacher forcing, see `lower_words`."""
    targets = self._targets(batch)
    ids = jnp.concatenate(
      [jnp.full((len(targets), 1), self._begin, jnp.int32), targets[:, :-1]], axis=1
    )
    logits: Any = module.decode(ids, jnp.ones(ids.shape, bool), self.encode(module, batch))
    return lower_words(logits, self._locations)

  def explained_scores(self, module: MPlug, batch: Batch) -> Float[Array, "rows 4"]:
    """Returns the log-probabilities of the location tokens "bins" i32[R, 1, 4]."""
    logits = jax.nn.log_softmax(self.forward(module, batch)[..., self._locations])
    bins = batch["bins"].reshape(-1, COORDINATES, 1)
    return jnp.take_along_axis(logits, bins, axis=-1)[..., 0]

  def loss_normalizers(self, batch: Batch, rng: PRNGKeyArray) -> Terms:
    """Returns the number of boxes."""
    return {"box": batch["valid"].sum(dtype=jnp.float32)}

  def loss(
    self, params: Params, state: Any, batch: Batch, rng: PRNGKeyArray | None
  ) -> tuple[Terms, Metrics, Any]:
    """See base.Task.loss."""
    logits = self.apply(params, self.forward, batch, rng=rng)
    targets, valid = self._targets(batch), batch["valid"].reshape(-1)
    truth = batch["box"].reshape(-1, COORDINATES)
    # Lowered logits never win, so the best token is the best location.
    best = logits[..., self._locations].argmax(-1)
    predicted = boxes.dequantize(best, self._bins)
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

  def predict_fns(self) -> dict[str, PredictFn]:
    """Returns "locate": the most probable box of every phrase."""
    return {"locate": self._locate}

  def _locate(self, params: Params, batch: Batch) -> dict[str, Any]:
    """Greedy search of four location tokens.

    Returns:
      {"box": f32[B, E, 4] corners in pixels of the original image, "bins": i32[B, E, 4],
      "score": f32[B, E] log-probability, "nearest": f32[B, E, 4] the true box after quantization,
      "size": i32[B, 2] of the batch}.
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
        boxes.dequantize(numbers, self._bins), batch["placed"], batch["size"], self.model.image_size
      )

    return {
      "box": pixels(bins),
      "bins": bins,
      "score": best.scores[:, 0].reshape(rows),
      "nearest": pixels(self._quantize(batch["box"])),
      "size": batch["size"],
    }
