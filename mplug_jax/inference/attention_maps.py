"""Where a model looked: maps over the image for each word of an answer or caption, a match, a class or a box.

Two maps, from the attention probabilities A of the fusion encoder and the decoder, heads averaged:

gradient: relu(A * dS/dA), S the score that is explained, summed over all places where text reads
image tokens: cross-attention of
  fusion layers (Grad-CAM as ALBEF has it, Selvaraju et al. 2017, for one layer), text rows of
  connected layers, cross-attention of the decoder. What made the score higher.
attention: rollout of A itself (Abnar and Zuidema 2020) from the position that the score is read at.
Where it looked, whatever came of it.

Connected layers mix image tokens. What is read of one after them is handed back to the tokens that
it was mixed from, by the rule of Chefer et al. (2021, equations 6, 8 and 9). The image encoder's
own attention is not followed: its token is taken for its patch.

Shapes: R rows (an image, or a clip, and a text each), W scores of each row, F images of a row, G
patches along a side, N image tokens, L text tokens, T decoder positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mplug_jax.tasks import grounding

_MODULES = ("fusion_encoder", "text_decoder")  # whose attention is followed
_TINY = 1e-12


class Looked(NamedTuple):
  """score: f32[R, W], what is explained, natural logarithms.

  Gradient, attention: f32[R, W, F, G, G], not negative, see above.
  """

  score: jax.Array
  gradient: jax.Array
  attention: jax.Array


# ---- what is explained


def _next_tokens(logits, ids, pad_id):
  """Log-probabilities of ids[:, 1:], 0 for padding. f32[R, T, V], i32[R, T] -> f32[R, T - 1]."""
  found = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)[..., 0]
  return jnp.where(ids[:, 1:] != pad_id, found, 0.0)


def _answer(task, module, batch):
  """Every token of "answer" behind its first, with one question a row and one answer to it."""
  return _next_tokens(
    task.forward(module, batch),
    batch["answer"].reshape(-1, batch["answer"].shape[-1]),
    task.tokenizer.pad_id,
  )


def _caption(task, module, batch):
  """Every token of "caption" behind its first, with one caption a row."""
  return _next_tokens(
    task.forward(module, batch),
    batch["caption"].reshape(-1, batch["caption"].shape[-1]),
    task.tokenizer.pad_id,
  )


def _box(task, module, batch):
  """The four location tokens of "box", with one phrase a row."""
  _, locations = grounding.location_ids(task.tokenizer, task.config.task.bins)
  logits = jax.nn.log_softmax(task.forward(module, batch)[..., locations])
  return jnp.take_along_axis(logits, batch["bins"].reshape(-1, grounding.COORDINATES, 1), axis=-1)[
    ..., 0
  ]


def _match(task, module, batch):
  """The log-odds that "caption" describes the image."""
  (image, _), (text, mask, _) = task.encode(module, batch)
  logits = module.match_logits(module.fuse(text, mask, image)[1])
  return logits[:, 1:] - logits[:, :1]


def _label(task, module, batch):
  """The class "label" of a row's one sentence."""
  return jnp.take_along_axis(
    jax.nn.log_softmax(task.forward(module, batch)[:, 0]), batch["label"], axis=-1
  )


# {config.task.name: function (task, bound model, batch) -> scores f32[R, W]}
SCORES = {
  "vqa": _answer,
  "caption": _caption,
  "scst": _caption,
  "grounding": _box,
  "retrieval": _match,
  "pretrain": _match,
  "classification": _label,
}


# ---- attention probabilities and their gradients


def _kept(tree):
  return {name: tree[name] for name in _MODULES if name in tree}


def look(task, params, batch):
  """Looked at a batch of one text a row. Jit it with `task` bound.

  Args:
    batch: what the task's `forward` reads, with the answer, caption, box or label to be explained
      in it; grounding also takes "bins" i32[R, 1, 4], the box's own (see `box_of_bins`).

  Raises:
    ValueError: more than one text a row.
  """
  score = SCORES[task.config.task.name]

  def forward(perturbations):
    variables = {"params": params, "perturbations": perturbations}
    scores, seen = task.model.apply(
      variables, batch, method=lambda module, b: score(task, module, b), mutable=["intermediates"]
    )
    return scores, _kept(seen["intermediates"])

  shapes = jax.eval_shape(forward, {})[1]
  scores, pull, weights = jax.vjp(
    forward, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), has_aux=True
  )
  separate = (
    task.config.task.name == "classification"
  )  # each image of a row is fused with the text by itself
  stream = _Stream(task.model, batch["image"], len(scores), separate)

  def of_word(word):
    (gradients,) = pull(jnp.zeros_like(scores).at[:, word].set(1.0))
    return stream.read(jax.tree.map(lambda a, g: jax.nn.relu(a * g), weights, gradients))

  gradient = jax.lax.map(of_word, jnp.arange(scores.shape[1])).swapaxes(0, 1)
  return Looked(
    scores, stream.maps(gradient), stream.maps(stream.rollout(weights, scores.shape[1]))
  )


def box_of_bins(bins, count):
  """Bins i32[..., 4] of `count` -> centred box f32[..., 4] that every rounding of boxes.quantise gives back as these bins."""
  return (bins + 0.25) / count


def _unit(x):
  """Rows that sum to 1, or are 0."""
  return x / jnp.maximum(x.sum(-1, keepdims=True), _TINY)


class _Stream:
  """Follows image tokens through fusion encoder and decoder.

  Trees of weights are those of the sown probabilities, not negative: f32[rows, H, queries, keys],
    the decoder's with its layers in front.
  `separate`: the F images of a row are fused one by one, else all their tokens together.
  """

  def __init__(self, model, image, rows, separate):
    self._depth, self._rows, self._patches = (
      model.fusion_layers,
      rows,
      model.image_size // model.patch_size,
    )
    self._images = image.size // (rows * 3 * model.image_size**2)  # F
    self._tokens = (1 + self._patches**2) * (
      1 if separate else self._images
    )  # that a text is fused with at a time

  def maps(self, relevance):
    """f32[R, W, F * N] -> f32[R, W, F, G, G], without class tokens."""
    split = relevance.reshape(relevance.shape[:2] + (self._images, -1))[..., 1:]
    return split.reshape(split.shape[:-1] + (self._patches,) * 2)

  def _layers(self, weights):
    """Fusion layers in the order in which they run: ({"attention", "crossattention"}: f32[rows, queries, keys], number of the image)."""
    fusion = weights.get("fusion_encoder", {})
    for j in range(self._depth):
      for number, name in enumerate(
        (f"layer_{j}", f"second_{j}")
      ):  # the second: see FusionEncoder.pair
        if name in fusion:
          yield {kind: x["probabilities"].mean(-3) for kind, x in fusion[name].items()}, number

  def _decoder(self, weights):
    """Of the decoder: (self-attention f32[layers, R, T, T], cross-attention f32[layers, R, T, S]), or None."""
    layers = weights.get("text_decoder", {}).get("layers")
    return layers and tuple(
      layers[kind]["probabilities"].mean(-3) for kind in ("attention", "crossattention")
    )

  def read(self, weights):
    """What text reads of each image token, all layers and queries added. -> f32[R, F * N]."""
    n, totals, mixed = self._tokens, {}, {}
    for layer, number in self._layers(weights):
      if "crossattention" in layer:
        totals[number] = totals.get(number, 0.0) + _handed_back(
          layer["crossattention"].sum(1), mixed.get(number)
        )
        continue
      joint = layer["attention"]
      totals[number] = totals.get(number, 0.0) + _handed_back(
        joint[:, n:, :n].sum(1), mixed.get(number)
      )
      before = mixed.get(number, jnp.eye(n))
      mixed[number] = before + joint[:, :n, :n] @ before
    if decoder := self._decoder(weights):
      totals[0] = totals.get(0, 0.0) + _handed_back(decoder[1][..., :n].sum((0, 2)), mixed.get(0))
    return jnp.concatenate([totals[number] for number in sorted(totals)], axis=-1).reshape(
      self._rows, -1
    )

  def rollout(self, weights, words):
    """Where the positions that `words` scores are read at got what they hold, in shares of all image tokens. -> f32[R, words, F * N]."""
    layers, n, text = list(self._layers(weights)), self._tokens, None
    count = 1 + max((number for _, number in layers), default=0)
    rows = len(next(iter(layers[0][0].values()))) if layers else self._rows
    # Of every token of a stream, the image tokens that it came from.
    images = [
      jnp.broadcast_to(jnp.eye(n, count * n, number * n), (rows, n, count * n))
      for number in range(count)
    ]
    for layer, number in layers:
      own, cross = layer["attention"], layer.get("crossattention")
      if text is None:
        text = jnp.zeros((rows, own.shape[-1] - (0 if cross is not None else n), count * n))
      if cross is not None:
        text = text + own @ text
        text = text + cross @ _unit(images[number])
      else:
        joint = jnp.concatenate([_unit(images[number]), text], axis=1)
        joint = joint + own @ joint
        images[number], text = joint[:, :n], joint[:, n:]
    if decoder := self._decoder(weights):
      memory = _unit(images[0] if text is None else jnp.concatenate([images[0], text], axis=1))
      text = jnp.zeros((rows, decoder[0].shape[-1], n))
      for own, cross in zip(*decoder):
        text = text + own @ text
        text = text + cross @ memory
    return _unit(text[:, :words].reshape(self._rows, words, -1))


def _handed_back(seen, mixed):
  """Relevance of the tokens of a mixed image -> of the tokens that it was mixed from, half of it to each token itself.

  seen: f32[rows, n]. mixed: f32[rows, n, n], the identity and what was added to it; None: not
    mixed.
  """
  if mixed is None:
    return seen
  own = jnp.eye(mixed.shape[-1])
  return jnp.einsum("rn,rnm->rm", seen, _unit(own + _unit(mixed - own)))
