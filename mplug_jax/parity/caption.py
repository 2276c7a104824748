"""Captioning: the decoder reads only image tokens; self-critical training (SCST), beams.

B images, T caption tokens, K beams.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mplug_jax.models.bert import Memory
from mplug_jax.models.mplug import MPlug
from mplug_jax.parity import beams
from mplug_jax.parity.recording import Recording
from mplug_jax.parity.rows import EXACT, LOGITS, SCORE, TENSOR, Check, Row
from mplug_jax.tasks import caption, scst


def checks(r: Recording) -> list[Check]:
  """Returns the checks of a recording.

  Args:
    r: recorded file.
  """
  case = Case(r, "in/image", encode)
  return [("forward and gradients", case.forward), ("SCST", case.scst), *beams.checks(r, case)]


def encode(m: MPlug, image: Float[Array, "batch size size 3"]) -> dict[str, Array]:
  """Encodes images.

  Args:
    m: bound model.
    image: normalized images f32[B, S, S, 3].

  Returns:
    Outputs by recorded name; "memory" f32[B, N, D] is the input of the decoder.
  """
  embeds = m.encode_image(image)
  return {"visual": m.visual_encoder(image), "image_embeds": embeds, "memory": embeds}


class Case:
  """A recording of captions.

  Attributes:
    r: recorded file.
    image: images or clips.
    prompt: i32[B, P], start of a search.
  """

  def __init__(
    self,
    r: Recording,
    images: str,
    encode: Callable[[MPlug, Any], dict[str, Array]],
    prompt: Int[np.ndarray, " width"] | None = None,
    skip: int = 0,
  ):
    """Reads the inputs.

    Args:
      r: recorded file.
      images: name of the array of images or clips.
      encode: function (bound model, images) -> outputs, see `encode`.
      prompt: i32[P], start of a search; None for [bos].
      skip: first caption positions that are no targets.
    """
    self.r = r
    self._encode = encode
    self._skip = skip
    self.image = r.image(images)
    prompt = np.array([r.bos]) if prompt is None else prompt
    self.prompt = jnp.asarray(np.tile(prompt, (len(self.image), 1)), jnp.int32)

  @functools.cached_property
  def online(self) -> tuple[Array, dict[str, Array], Any]:
    """The loss, {name: output} and gradients."""

    def loss(params, image, ids, mask):
      def forward(m):
        out = self._encode(m, image)
        return out | {"decoder_logits": m.decode(ids, mask, m.memory(out["memory"]))}

      out: Any = self.r.model.apply({"params": params}, method=forward)
      counted = caption.targets(mask, self._skip)
      return caption.cross_entropy(out["decoder_logits"], ids, counted) / counted.sum(), out

    (value, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
      self.r.params, self.image, *self.r.text("in/caption")
    )
    return value, out, gradients

  @property
  def memory(self) -> Memory:
    """Memory of the decoder."""
    return self.r.model.memory(self.online[1]["memory"])

  def forward(self) -> Iterator[Row]:
    """Compares outputs, loss and gradients."""
    loss, out, gradients = self.online
    yield from self.r.compare(
      {name: x for name, x in out.items() if name not in ("memory", "decoder_logits")}, TENSOR
    )
    yield from self.r.compare({"decoder_logits": out["decoder_logits"]}, LOGITS)
    yield from self.r.compare({"loss": loss}, LOGITS)
    yield from self.r.compare_gradients(gradients, "loss")

  def scst(self) -> Iterator[Row]:
    """Compares the loss of scores of sampled captions, which teacher forcing gives a gradient."""
    r = self.r
    if r.lacks("out/scst_loss"):
      return
    search = self._search_of_scst()
    ids = jnp.asarray(r[f"{search}/ids"])
    lengths = jnp.asarray(r[f"{search}/lengths"])
    start = self.prompt.shape[1]

    def loss(params, image, reward):
      def forward(m):
        # Padded with -1, because the pad id may be generated.
        flat = jnp.maximum(ids, 0).reshape(-1, ids.shape[-1])
        return m.decode(
          flat,
          jnp.arange(ids.shape[-1]) < lengths.reshape(-1, 1),
          m.memory(self._encode(m, image)["memory"]),
        )

      logits: Any = r.model.apply({"params": params}, method=forward)
      logits = logits.reshape(ids.shape + (-1,))
      scores = scst.log_probabilities(
        logits, jnp.maximum(ids, 0), lengths, start
      ) / scst.length_penalties(lengths, start, ids.shape[-1])
      return scst.policy_losses(
        scores, lengths, reward - reward.mean(1, keepdims=True), "official"
      ).mean(), scores

    (value, scores), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
      r.params, self.image, jnp.asarray(r["in/scst_reward"])
    )
    yield from r.compare({"scst_lengths": lengths}, EXACT)
    yield from r.compare({"scst_scores": scores, "scst_loss": value}, SCORE)
    yield from r.compare_gradients(gradients, "scst_loss")

  def _search_of_scst(self) -> str:
    """Returns the name of the recorded search with the rewarded lengths and scores."""
    r = self.r
    lengths, scores = r["out/scst_lengths"], r["out/scst_scores"]
    for name in r.names("beam/"):
      if name.endswith("/lengths") and np.array_equal(r[name], lengths):
        search = name.removesuffix("/lengths")
        if np.abs(r[f"{search}/scores"] - scores).max() <= SCORE.absolute:
          return search
    raise ValueError(
      "no recorded search has the lengths and scores of out/scst_lengths and out/scst_scores"
    )
