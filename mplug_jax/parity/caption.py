"""Captioning: the decoder reads image tokens alone.

Self-critical training (SCST) on a recorded search; beams.

B images, T caption tokens, K beams.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.parity import beams
from mplug_jax.parity.rows import EXACT, LOGITS, SCORE, TENSOR
from mplug_jax.tasks import caption, scst


def checks(r):
  """Recording -> [(name, function -> Rows)]."""
  case = Case(r, "in/image", encode)
  return [("forward and gradients", case.forward), ("SCST", case.scst), *beams.checks(r, case)]


def encode(m, image):
  """f32[B, S, S, 3] -> outputs by recorded name; "memory" f32[B, N, D] is what the decoder reads."""
  embeds = m.encode_image(image)
  return {"visual": m.visual_encoder(image), "image_embeds": embeds, "memory": embeds}


class Case:
  """A recording of captions.

  Args:
    images: name of the array of images or clips. encode: method of MPlug on them, as `encode`
      above.
    prompt: i32[P], how a search begins; None: with [bos]. skip: first caption positions that are no
      targets.
  """

  def __init__(self, r, images, encode, prompt=None, skip=0):
    self.r, self._encode, self._skip = r, encode, skip
    self.image = r.image(images)
    prompt = np.array([r.bos]) if prompt is None else prompt
    self.prompt = jnp.asarray(np.tile(prompt, (len(self.image), 1)), jnp.int32)

  @functools.cached_property
  def online(self):
    """(loss, {name: output}, gradients)."""

    def loss(params, image, ids, mask):
      def forward(m):
        out = self._encode(m, image)
        return out | {"decoder_logits": m.decode(ids, mask, m.memory(out["memory"]))}

      out = self.r.model.apply({"params": params}, method=forward)
      counted = caption.targets(mask, self._skip)
      return caption.cross_entropy(out["decoder_logits"], ids, counted) / counted.sum(), out

    (value, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
      self.r.params, self.image, *self.r.text("in/caption")
    )
    return value, out, gradients

  @property
  def memory(self):
    return self.r.model.memory(self.online[1]["memory"])

  def forward(self):
    loss, out, gradients = self.online
    yield from self.r.compare(
      {name: x for name, x in out.items() if name not in ("memory", "decoder_logits")}, TENSOR
    )
    yield from self.r.compare({"decoder_logits": out["decoder_logits"]}, LOGITS)
    yield from self.r.compare({"loss": loss}, LOGITS)
    yield from self.r.compare_gradients(gradients, "loss")

  def scst(self):
    """Scores of the sampled captions again, by teacher forcing: those carry the gradient."""
    r = self.r
    if r.lacks("out/scst_loss"):
      return
    search = self._search_of_scst()
    ids, lengths, start = (
      jnp.asarray(r[f"{search}/ids"]),
      jnp.asarray(r[f"{search}/lengths"]),
      self.prompt.shape[1],
    )

    def loss(params, image, reward):
      def forward(m):
        flat = jnp.maximum(ids, 0).reshape(
          -1, ids.shape[-1]
        )  # padded with -1, for the pad id may have been generated
        return m.decode(
          flat,
          jnp.arange(ids.shape[-1]) < lengths.reshape(-1, 1),
          m.memory(self._encode(m, image)["memory"]),
        )

      logits = r.model.apply({"params": params}, method=forward).reshape(ids.shape + (-1,))
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

  def _search_of_scst(self):
    """Name of the recorded search whose lengths and scores are the rewarded ones."""
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
