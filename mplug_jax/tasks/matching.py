"""Image-text matching scores and losses, shared by retrieval and pre-training."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from mplug_jax.arrays import Array
from mplug_jax.losses import language_modeling
from mplug_jax.models.mplug import MPlug
from mplug_jax.parallel import rules

# Tokens f[B, L, D] and mask bool[B, L] of texts.
Text: TypeAlias = tuple[Any, Any]

# Labels of the pairs of `match`.
MATCH_LABELS = np.array([1, 0, 0], np.int32)


def image_memory(module: MPlug, image: Float[Array, "images tokens width"]) -> dict[str, Any]:
  """Part of the fusion encoder's input that depends on the image alone.

  Args:
    module: bound model.
    image: image tokens, dtype[G, N, D].

  Returns:
    "keys_values", a (key, value) pair dtype[G, N, D] for each layer before the first connected
    one, and "tokens", `image` for the layers from there on, None without such layers.
  """
  fusion = module.fusion_encoder
  return {
    "keys_values": fusion.image_keys_values(image),
    "tokens": image if fusion.connected else None,
  }


def match_scores(
  module: MPlug,
  memory: dict[str, Any],
  texts: dict[str, Any],
  pair_text: Int[Array, "images pairs"],
  temperature: Any,
  similarity: str,
) -> Float[Array, "images pairs"]:
  """Scores of G images with P texts each.

  Args:
    module: bound model.
    memory: `image_memory` of the images, and their "feature" f32[G, E].
    texts: "tokens" dtype[T, L, D], "text_mask" bool[T, L] and "feature" f32[T, E] of all T texts.
    pair_text: i32[G, P], the texts to match each image with.
    temperature: f32[], read by "likelihood" only.
    similarity: "none" for the logit of a match, as the official retrieval; "add" for its sum with
      the similarity, as the official video retrieval; "likelihood" for the log-odds of a match
      plus similarity / temperature. Training draws wrong pairs with probability proportional to
      exp(similarity / temperature), so that the log-odds of a perfect matcher are the log-ratio of
      the density of true pairs to that; the sum is the log-likelihood of the pair up to a constant.

  Returns:
    f32[G, P].
  """
  index = pair_text.reshape(-1)
  _, fused = module.fusion_encoder(
    rules.constrain(texts["tokens"][index]),
    texts["text_mask"][index],
    memory["tokens"],
    memory["keys_values"],
  )
  logits = module.match_logits(fused).reshape(pair_text.shape + (2,))
  products = (
    0.0
    if similarity == "none"
    else jnp.einsum("ge,gpe->gp", memory["feature"], texts["feature"][pair_text])
  )
  return match_score(logits, products, temperature, similarity)


def match_score(
  logits: Float[Array, "*pairs 2"], products: Any, temperature: Any, similarity: str
) -> Float[Array, "*pairs"]:
  """Combines matching logits and similarities.

  Args:
    logits: f32[..., 2] of the classes no match and match.
    products: f32[...], products of the contrastive features.
    temperature: f32[].
    similarity: see `match_scores`.

  Returns:
    f32[...].
  """
  if similarity == "none":
    return logits[..., 1]
  return (
    logits[..., 1] + products
    if similarity == "add"
    else logits[..., 1] - logits[..., 0] + products / temperature
  )


def match(
  module: MPlug,
  image: Float[Array, "batch tokens width"],
  text: Float[Array, "batch length width"],
  mask: Bool[Array, "batch length"],
  other_image: Float[Array, "batch tokens width"],
  other_text: Float[Array, "batch length width"],
  other_mask: Bool[Array, "batch length"],
  more: Sequence[Text] = (),
) -> tuple[
  Float[Array, "batch 3 2"],
  Float[Array, "batch 3 length width"],
  list[Any],
  Float[Array, "batch tokens width"],
]:
  """Fuses each image with its text and with a wrong text, and each text with a wrong image.

  The pairs with the right image are fused in one pass, so that its keys and values are computed
  once; a second pass reads the wrong image.

  Args:
    module: bound model.
    image: f[B, N, D].
    text: f[B, L, D].
    mask: bool[B, L] of `text`.
    other_image: a wrong image for each row, f[B, N, D].
    other_text: a wrong text for each row, f[B, L, D].
    other_mask: bool[B, L] of `other_text`.
    more: further texts to fuse with the right image in the first pass.

  Returns:
    Logits f32[B, 3, 2] and fused texts dtype[B, 3, L, D] of the right pair, the pair with the wrong
    text and the pair with the wrong image; fused texts dtype[B, L, D] of each of `more`; image
    tokens dtype[B, N, D] after fusion with the last text.
  """

  def side_by_side(x):
    return jnp.stack(x, axis=1).reshape((-1, *x[0].shape[1:]))

  texts, masks = zip((text, mask), (other_text, other_mask), *more)
  count = len(texts)
  image_read, first = module.fuse(side_by_side(texts), side_by_side(masks), image)
  _, second = module.fuse(text, mask, other_image)
  first = first.reshape((-1, count) + first.shape[1:])
  fused = jnp.concatenate([first[:, :2], second[:, None]], axis=1)
  logits = module.match_logits(fused.reshape((-1,) + fused.shape[2:])).reshape(-1, 3, 2)
  if image_read.shape[0] != image.shape[0]:  # Connected layers change the image for every text.
    image_read = image_read.reshape((-1, count) + image_read.shape[1:])[:, -1]
  return logits, fused, [first[:, i] for i in range(2, count)], image_read


def matching_losses(logits: Float[Array, "batch 3 2"]) -> Float[Array, "batch 3"]:
  """Returns the cross-entropy f32[B, 3] of logits f32[B, 3, 2] of the pairs of `match`."""
  return language_modeling.token_cross_entropy(
    logits, jnp.broadcast_to(MATCH_LABELS, logits.shape[:2])
  )


def contrastive_accuracy(
  nearest: Mapping[str, Any], ids: Any, queues: Any, valid: Any
) -> tuple[Any, Any]:
  """Returns how often the most similar column belongs to the row's image, in both directions.

  Args:
    nearest: {direction: i32[B] column of the largest similarity}.
    ids: i32[B] image ids of the batch.
    queues: {"idx_queue": i32[1, Q]} ids of the queue, or nothing.
    valid: bool[B], rows that count.

  Returns:
    (sum, count).
  """
  columns = jnp.concatenate([ids, queues["idx_queue"][0] if queues else ids[:0]])
  right = [((columns[column] == ids) & valid).sum() for column in nearest.values()]
  return sum(right, jnp.float32(0.0)), 2.0 * valid.sum()
