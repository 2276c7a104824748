"""Visual grounding: a box as four location tokens, its loss with the box weights, greedy boxes.

B phrases and images, V vocabulary. Boxes are centre x, centre y, width, height, as shares of the image.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax import decode, losses
from mplug_jax.models.mplug import decoding_fns, MPlug
from mplug_jax.parity.recording import encode
from mplug_jax.parity.rows import EXACT, LOGITS, TENSOR, Tolerance

_OUTSIDE = Tolerance(2e-3)  # logits lowered by 10,000: one float32 step there is 1e-3


def checks(r):
  """Recording -> [(name, function -> Rows)]."""
  case = _Case(r)
  return [("forward and gradients", case.forward), ("box weights", case.box_weights), ("greedy boxes", case.boxes)]


def _corners(boxes):
  return np.concatenate([boxes[:, :2] - 0.5 * boxes[:, 2:], boxes[:, :2] + 0.5 * boxes[:, 2:]], axis=1)


def _giou(a, b):
  """Generalised IoU of boxes f32[B, 4], row by row -> f32[B]; denominators as in the official code."""
  area_a, area_b = (x[:, 2] * x[:, 3] for x in (a, b))
  a, b = _corners(a), _corners(b)
  inside = np.maximum(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0).prod(1)
  hull = np.maximum(np.maximum(a[:, 2:], b[:, 2:]) - np.minimum(a[:, :2], b[:, :2]), 0).prod(1)
  union = area_a + area_b - inside
  return inside / (union + 1e-5) - (hull - union) / (hull + 1e-5)


class _Case:
  """A recording's inputs, and what several checks share."""

  def __init__(self, r):
    self.r = r
    self.text, self.mask = r.text("in/text")
    self.lowered = jnp.asarray(r.state_dict["bbox_prob_mask"]).reshape(-1)  # f32[V], added to the logits: 0 or -10,000
    self.bins = np.flatnonzero(np.asarray(self.lowered) == 0)
    self.prefix = jnp.full((len(self.text), 1), int(r.state_dict["prefix_ids"].reshape(-1)[0]), jnp.int32)
    # Box coordinates that are 1 or more fall into the last of meta.bins + 1 bins.
    self.target = (np.floor(np.clip(r["in/boxes"], 0, 1) * np.float32(r.meta["bins"])) + self.bins[0]).astype(np.int32)

  def _boxes_of(self, ids):
    return ((np.asarray(ids) - self.bins[0]) / self.r.meta["bins"]).astype(np.float32)

  @functools.cached_property
  def _weights(self):
    """(predicted ids i32[B, 4], |predicted - given box| f32[B, 4], 1 - generalised IoU f32[B]) under teacher forcing."""
    predicted = self._logits[:, :-1].argmax(-1)
    boxes, given = self._boxes_of(predicted), self.r["in/boxes"]
    return predicted, np.minimum(np.abs(boxes - given), 5), 1 - _giou(boxes, given)

  def _forward(self, m, image, text, mask, ids):
    """-> recorded outputs by name; "decoder_logits" f32[B, 5, V] have the words' logits lowered."""
    out = encode(m, image, text, mask)
    memory = m.memory(out["fusion_image"], out["fusion_text"], mask)
    return out | {"decoder_logits": m.decode(ids, jnp.ones(ids.shape, bool), memory) + self.lowered}

  @functools.cached_property
  def _program(self):
    """(params, box weights f32[4]) -> ((loss, outputs), gradients)."""
    ids = jnp.concatenate([self.prefix, jnp.asarray(self.target)], axis=1)

    def loss(params, weights, *inputs):
      out = self.r.model.apply({"params": params}, *inputs, ids, method=self._forward)
      token_loss = losses.token_cross_entropy(out["decoder_logits"][:, :-1], ids[:, 1:])
      return (token_loss.mean(0) * weights).mean(), out | {"token_loss": token_loss}

    program = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda weights: program(self.r.params, weights, self.r.image(), self.text, self.mask)

  @functools.cached_property
  def _online(self):
    return self._program(jnp.ones(4))

  @property
  def _logits(self):
    return np.asarray(self._online[0][1]["decoder_logits"])

  def forward(self):
    r = self.r
    (loss, out), _ = self._online
    yield from r.compare({"target_ids": self.target}, EXACT)
    yield from r.compare({name: x for name, x in out.items() if name not in ("decoder_logits", "token_loss")}, TENSOR)
    name = "out/decoder_logits"
    if not r.lacks(name):
      words = np.setdiff1d(np.arange(len(self.lowered)), self.bins)
      for part, ids, tolerance in ((" (bins)", self.bins, LOGITS), (" (words)", words, _OUTSIDE)):
        yield r.compare_part(name, part, self._logits[..., ids], r[name][..., ids], tolerance)
    yield from r.compare({"token_loss": out["token_loss"], "loss_seq_unweighted": loss}, LOGITS)

  def box_weights(self):
    """The released loss multiplies every sample's tokens with every sample's box (docs/official.md item 11)."""
    r = self.r
    predicted, bbox, giou = self._weights
    yield from r.compare({"teacher_pred_ids": predicted}, EXACT)
    yield from r.compare({"weight_bbox": bbox, "weight_giou": giou}, TENSOR)
    (loss, _), gradients = self._program(jnp.asarray((bbox * giou[:, None]).mean(0), jnp.float32))
    yield from r.compare({"loss_seq": loss}, LOGITS)
    yield from r.compare_gradients(gradients, "loss_seq")

  def boxes(self):
    r = self.r
    if r.lacks("out/pred_ids", "out/pred_boxes"):
      return
    out = self._online[0][1]

    @jax.jit
    def search(params, memory):
      cache = r.model.apply({"params": params}, memory, 1, 1 + 4, method=MPlug.init_cache)
      step, _ = decoding_fns(r.model, params)
      return decode.greedy(step, cache, self.prefix, jnp.ones(len(self.text), jnp.int32), max_length=4, eos_id=r.eos, pad_id=-1,
                           allowed=self.lowered == 0)

    memory = r.model.memory(out["fusion_image"], out["fusion_text"], self.mask)
    ids = np.asarray(search(r.params, memory).tokens)[:, 0, 1:]
    yield from r.compare({"pred_ids": ids}, EXACT)
    yield from r.compare({"pred_boxes": self._boxes_of(ids)}, TENSOR)
