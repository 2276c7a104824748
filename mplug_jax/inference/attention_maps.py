"""Attention maps over the image for each word of an answer or caption, a match, a class or a box.

There are two kinds, from the attention probabilities A of fusion encoder and decoder, averaged
over heads:

gradient: relu(A * dS/dA) for the explained score S, summed over all places where text reads image
  tokens: cross-attention of the fusion layers (Grad-CAM as ALBEF, Selvaraju et al. 2017, uses it
  for one layer), text rows of connected layers, and cross-attention of the decoder. It shows what
  raised the score.
attention: rollout of A (Abnar and Zuidema 2020) from the position that the score is read at. It
  shows what the model read, independently of the score.

Connected layers mix image tokens. Relevance of a mixed token is returned to the tokens that it was
mixed from, by the rule of Chefer et al. (2021, equations 6, 8 and 9). The attention of the image
encoder is not followed: an image token represents its patch.

Shapes: R rows (an image or clip, and a text), W scores of each row, F images of a row, G patches
along a side, N image tokens, L text tokens, T decoder positions.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from mplug_jax.arrays import Array
from mplug_jax.tasks import base

_MODULES = ("fusion_encoder", "text_decoder")  # whose attention is followed
_TINY = 1e-12


class Looked(NamedTuple):
  """Scores and their maps.

  Attributes:
    score: f32[R, W], log-probabilities or log-odds.
    gradient: f32[R, W, F, G, G], not negative.
    attention: f32[R, W, F, G, G], not negative.
  """

  score: Any
  gradient: Any
  attention: Any


def look(task: base.Task, params: base.Params, batch: base.Batch) -> Looked:
  """Maps of a batch with one text per row; jit it with `task` bound.

  Args:
    task: a task with `explained_scores`.
    params: its parameters.
    batch: what the task's `forward` reads, with the answer, caption, box or label to explain;
      grounding also reads "bins" i32[R, 1, 4], those of the box (see `box_of_bins`).

  Returns:
    Looked.

  Raises:
    NotImplementedError: the task has no scores to explain.
  """

  def forward(perturbations: Any) -> tuple[Any, Any]:
    variables = {"params": params, "perturbations": perturbations}
    scores, state = task.model.apply(
      variables, batch, method=task.explained_scores, mutable=["intermediates"]
    )
    sown = state["intermediates"]
    return scores, {name: sown[name] for name in _MODULES if name in sown}

  shapes = jax.eval_shape(forward, {})[1]
  scores, pull, weights = jax.vjp(
    forward, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), has_aux=True
  )
  stream = _Stream(task.model, batch["image"], len(scores), task.separate_images)

  def of_word(word: Any) -> Any:
    (gradients,) = pull(jnp.zeros_like(scores).at[:, word].set(1.0))
    return stream.read(jax.tree.map(lambda a, g: jax.nn.relu(a * g), weights, gradients))

  gradient = jax.lax.map(of_word, jnp.arange(scores.shape[1])).swapaxes(0, 1)
  attention = stream.rollout(weights, scores.shape[1])
  return Looked(scores, stream.maps(gradient), stream.maps(attention))


def box_of_bins(bins: Int[Array, "*rows 4"], count: int) -> Float[Any, "*rows 4"]:
  """Returns a centered box that every rounding of `boxes.quantize` maps to these bins.

  Args:
    bins: i32[..., 4].
    count: number of bins.

  Returns:
    f32[..., 4], shares of the canvas.
  """
  return (bins + 0.25) / count


def _unit(x: Any) -> Any:
  """Divides rows by their sums; rows of zeros are kept."""
  return x / jnp.maximum(x.sum(-1, keepdims=True), _TINY)


def _chain_relevance(seen: Any, mixed: Any) -> Any:
  """Returns relevance of mixed image tokens to the tokens that they were mixed from.

  Half of it goes to each token itself.

  Args:
    seen: relevance f32[rows, n].
    mixed: f32[rows, n, n], the identity and what layers added to it; None: not mixed.

  Returns:
    f32[rows, n].
  """
  if mixed is None:
    return seen
  identity = jnp.eye(mixed.shape[-1])
  return jnp.einsum("rn,rnm->rm", seen, _unit(identity + _unit(mixed - identity)))


class _Stream:
  """Follows image tokens through fusion encoder and decoder.

  Trees of weights are those of the sown probabilities, not negative: f32[rows, H, queries, keys],
  of the decoder with its layers as the first axis.
  """

  def __init__(self, model: Any, image: Any, rows: int, separate: bool):
    """Stores sizes.

    Args:
      model: the MPlug module.
      image: u8[R, ..., S, S, 3], images or clips.
      rows: R.
      separate: whether the F images of a row are fused one by one, else all their tokens together.
    """
    self._depth = model.fusion_layers
    self._rows = rows
    self._patches = model.image_size // model.patch_size
    self._images = image.size // (rows * 3 * model.image_size**2)  # F
    # Tokens that a text is fused with at a time.
    self._tokens = (1 + self._patches**2) * (1 if separate else self._images)

  def maps(self, relevance: Any) -> Any:
    """Converts f32[R, W, F * N] to f32[R, W, F, G, G], without class tokens."""
    split = relevance.reshape(relevance.shape[:2] + (self._images, -1))[..., 1:]
    return split.reshape(split.shape[:-1] + (self._patches,) * 2)

  def _layers(self, weights: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields the fusion layers in order.

    Yields:
      ({"attention", "crossattention"}: f32[rows, queries, keys], number of the image).
    """
    fusion = weights.get("fusion_encoder", {})
    for j in range(self._depth):
      # "second" is the layer of the second image, see FusionEncoder.pair.
      for number, name in enumerate((f"layer_{j}", f"second_{j}")):
        if name in fusion:
          yield {kind: x["probabilities"].mean(-3) for kind, x in fusion[name].items()}, number

  def _decoder(self, weights: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Returns self-attention f32[layers, R, T, T] and cross-attention f32[layers, R, T, S]."""
    layers = weights.get("text_decoder", {}).get("layers")
    if not layers:
      return None
    return (
      layers["attention"]["probabilities"].mean(-3),
      layers["crossattention"]["probabilities"].mean(-3),
    )

  def read(self, weights: Mapping[str, Any]) -> Any:
    """Sums what text reads of each image token over layers and queries: f32[R, F * N]."""
    n = self._tokens
    totals: dict[int, Any] = {}
    mixed: dict[int, Any] = {}
    for layer, number in self._layers(weights):
      if "crossattention" in layer:
        relevance = layer["crossattention"].sum(1)
      else:
        relevance = layer["attention"][:, n:, :n].sum(1)
      totals[number] = totals.get(number, 0.0) + _chain_relevance(relevance, mixed.get(number))
      if "crossattention" not in layer:
        before = mixed.get(number, jnp.eye(n))
        mixed[number] = before + layer["attention"][:, :n, :n] @ before
    if decoder := self._decoder(weights):
      relevance = decoder[1][..., :n].sum((0, 2))
      totals[0] = totals.get(0, 0.0) + _chain_relevance(relevance, mixed.get(0))
    by_image = [totals[number] for number in sorted(totals)]
    return jnp.concatenate(by_image, axis=-1).reshape(self._rows, -1)

  def rollout(self, weights: Mapping[str, Any], words: int) -> Any:
    """Shares of the image tokens in the positions that the scores are read at.

    Args:
      weights: attention probabilities.
      words: number of scores, W.

    Returns:
      f32[R, W, F * N].
    """
    n = self._tokens
    images, text = self._fusion_rollout(weights)
    if decoder := self._decoder(weights):
      memory = _unit(images[0] if text is None else jnp.concatenate([images[0], text], axis=1))
      text = jnp.zeros((self._rows, decoder[0].shape[-1], n))
      for self_attention, cross_attention in zip(*decoder):
        text = text + self_attention @ text
        text = text + cross_attention @ memory
    assert text is not None, "neither fusion layers nor a decoder"
    return _unit(text[:, :words].reshape(self._rows, words, -1))

  def _fusion_rollout(self, weights: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """Returns the image tokens that the tokens of each image, and of the text, came from.

    Returns:
      ([f32[rows, n, F * n] of each image], f32[rows, L, F * n] or None without fusion layers).
    """
    layers = list(self._layers(weights))
    n = self._tokens
    count = 1 + max((number for _, number in layers), default=0)
    rows = len(next(iter(layers[0][0].values()))) if layers else self._rows
    images = [
      jnp.broadcast_to(jnp.eye(n, count * n, number * n), (rows, n, count * n))
      for number in range(count)
    ]
    text = None
    for layer, number in layers:
      attention = layer["attention"]
      cross = layer.get("crossattention")
      if text is None:
        length = attention.shape[-1] - (0 if cross is not None else n)
        text = jnp.zeros((rows, length, count * n))
      if cross is not None:
        text = text + attention @ text
        text = text + cross @ _unit(images[number])
      else:
        joint = jnp.concatenate([_unit(images[number]), text], axis=1)
        joint = joint + attention @ joint
        images[number] = joint[:, :n]
        text = joint[:, n:]
    return images, text
