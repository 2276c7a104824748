"""Image-text matching scores and losses, shared by retrieval and pre-training."""

import jax.numpy as jnp
import numpy as np

from mplug_jax.losses import language_modeling
from mplug_jax.parallel import rules

MATCH_LABELS = np.array([1, 0, 0], np.int32)  # of the pairs of `match`


def image_memory(module, image):
  """What the fusion encoder reads of images, whatever the text.

  Args:
    image: dtype[G, N, D], tokens.

  Returns:
    {"keys_values": a (key, value) pair for each layer before the first connected one, dtype[G, H, N, Dh], "tokens": `image` for the
    layers from there on, None when there are none}.
  """
  fusion = module.fusion_encoder
  return {
    "keys_values": fusion.image_keys_values(image),
    "tokens": image if fusion.connected else None,
  }


def match_scores(module, memory, texts, pair_text, temperature, similarity):
  """Scores of G images with P texts each.

  Args:
    memory: `image_memory` of the images, and their "feature" f32[G, E].
    texts: of all T texts "tokens" dtype[T, L, D], "text_mask" bool[T, L], "feature" f32[T, E].
    pair_text: i32[G, P], the texts to match each image with. temperature: f32[].
    similarity: "none": the logit of a match, as the official retrieval; "add": plus the similarity, as the official video retrieval;
      "likelihood": the log-odds of a match plus similarity / temperature. Wrong pairs were drawn by that in training, so a perfect
      matcher tells only the ratio of the true pairs' density to it; their sum is the log-likelihood of the pair, up to a constant.

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


def match_score(logits, products, temperature, similarity):
  """Logits f32[..., 2] of a match and products f32[...] of features -> f32[...], see `match_scores`."""
  if similarity == "none":
    return logits[..., 1]
  return (
    logits[..., 1] + products
    if similarity == "add"
    else logits[..., 1] - logits[..., 0] + products / temperature
  )


def match(module, image, text, mask, other_image, other_text, other_mask, more=()):
  """Fuses every image with its own text and with another, and its text with another image.

  The two pairs of the first kind share the image, whose keys and values are computed once for both; a second pass reads the other
  image. Three pairs for two images' worth of keys and values.

  Args:
    image: f[B, N, D]. text: f[B, L, D]. mask: bool[B, L]. other_image, other_text, other_mask: the same, row by row.
    more: (text, mask) pairs, further texts to fuse with the own image in the first pass.

  Returns:
    (logits f32[B, 3, 2], fused texts dtype[B, 3, L, D]): own pair, own image with the other text, other image with the own text;
    the fused texts dtype[B, L, D] of each of `more`, and the image tokens as the last of them leaves them, dtype[B, N, D].
  """
  texts, masks = zip((text, mask), (other_text, other_mask), *more)
  count = len(texts)
  side_by_side = lambda x: jnp.stack(x, axis=1).reshape((-1,) + x[0].shape[1:])  # noqa: E731
  image_read, first = module.fuse(side_by_side(texts), side_by_side(masks), image)
  _, second = module.fuse(text, mask, other_image)
  first = first.reshape((-1, count) + first.shape[1:])
  fused = jnp.concatenate([first[:, :2], second[:, None]], axis=1)
  logits = module.match_logits(fused.reshape((-1,) + fused.shape[2:])).reshape(-1, 3, 2)
  if image_read.shape[0] != image.shape[0]:  # connected layers gave every text an image of its own
    image_read = image_read.reshape((-1, count) + image_read.shape[1:])[:, -1]
  return logits, fused, [first[:, i] for i in range(2, count)], image_read


def matching_losses(logits):
  """Cross-entropy of the pairs of `match`. f32[B, 3, 2] -> f32[B, 3]."""
  return language_modeling.token_cross_entropy(
    logits, jnp.broadcast_to(MATCH_LABELS, logits.shape[:2])
  )
