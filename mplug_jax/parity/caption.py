"""Captioning: the decoder reads image tokens alone; self-critical training (SCST) on a recorded search; beams.

B images, T caption tokens, K beams.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax import losses
from mplug_jax.parity import beams
from mplug_jax.parity.rows import EXACT, LOGITS, SCORE, TENSOR

_LENGTH_PENALTY = 0.6


def checks(r):
  """Recording -> [(name, function -> Rows)]."""
  case = Case(r, "in/image", encode)
  return [("forward and gradients", case.forward), ("SCST", case.scst), *beams.checks(r, case)]


def encode(m, image):
  """f32[B, S, S, 3] -> outputs by recorded name; "memory" f32[B, N, D] is what the decoder reads."""
  embeds = m.encode_image(image)
  return {"visual": m.visual_encoder(image), "image_embeds": embeds, "memory": embeds}


def mean_loss(logits, ids, mask, skip=0):
  """Mean over all tokens of the batch, the first `skip` positions ignored as targets. f32[B, T, V], i32[B, T], bool[B, T] -> f32[]."""
  counted = mask[:, 1:] & (jnp.arange(1, ids.shape[1]) >= skip)
  return jnp.where(counted, losses.token_cross_entropy(logits[:, :-1], ids[:, 1:]), 0.0).sum() / counted.sum()


class Case:
  """A recording of captions.

  Args:
    images: name of the array of images or clips. encode: method of MPlug on them, as `encode` above.
    prompt: i32[P], how a search begins; None: with [bos]. skip: first caption positions that are no targets.
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
      return mean_loss(out["decoder_logits"], ids, mask, self._skip), out

    (value, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(self.r.params, self.image, *self.r.text("in/caption"))
    return value, out, gradients

  @property
  def memory(self):
    return self.r.model.memory(self.online[1]["memory"])

  def forward(self):
    loss, out, gradients = self.online
    yield from self.r.compare({name: x for name, x in out.items() if name not in ("memory", "decoder_logits")}, TENSOR)
    yield from self.r.compare({"decoder_logits": out["decoder_logits"]}, LOGITS)
    yield from self.r.compare({"loss": loss}, LOGITS)
    yield from self.r.compare_gradients(gradients, "loss")

  def scst(self):
    """Scores of the sampled captions again, by teacher forcing: those carry the gradient."""
    r = self.r
    if r.lacks("out/scst_loss"):
      return
    search = self._search_of_scst()
    ids, lengths = jnp.asarray(r[f"{search}/ids"]), r[f"{search}/lengths"]
    penalty = jnp.asarray(((5 + lengths - self.prompt.shape[1]) / 6) ** _LENGTH_PENALTY, jnp.float32)  # powers from float64, as decode

    def loss(params, image, reward):
      def forward(m):
        memory = jnp.repeat(self._encode(m, image)["memory"], ids.shape[1], axis=0)
        flat = ids.reshape(-1, ids.shape[-1])
        return m.decode(jnp.where(flat < 0, r.pad, flat), flat >= 0, m.memory(memory))

      logits = r.model.apply({"params": params}, method=forward).reshape(ids.shape + (-1,))
      generated = (ids[:, :, 1:] >= 0) & (jnp.arange(1, ids.shape[2]) >= self.prompt.shape[1])
      log_probs = -losses.token_cross_entropy(logits[:, :, :-1], jnp.maximum(ids[:, :, 1:], 0))
      scores = jnp.where(generated, log_probs, 0.0).sum(-1) / penalty
      return (-(scores / lengths) * (reward - reward.mean(1, keepdims=True))).mean(), scores

    (value, scores), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(r.params, self.image, jnp.asarray(r["in/scst_reward"]))
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
    raise ValueError("no recorded search has the lengths and scores of out/scst_lengths and out/scst_scores")
