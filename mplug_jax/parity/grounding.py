"""Visual grounding: a box as four location tokens, its loss with the box weights, greedy boxes.

B phrases and images, V vocabulary. Boxes are center x, center y, width, height, as shares of the
image.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mplug_jax.data import boxes
from mplug_jax.decoding import beam_search
from mplug_jax.losses import language_modeling
from mplug_jax.models.mplug import MPlug, decoding_fns
from mplug_jax.parity.recording import Recording, encode
from mplug_jax.parity.rows import EXACT, LOGITS, TENSOR, Check, Row, Tolerance
from mplug_jax.tasks import grounding as task

_OUTSIDE = Tolerance(2e-3)  # logits lowered by 10,000: one float32 step there is 1e-3


def checks(r: Recording) -> list[Check]:
  """Returns the checks of a recording.

  Args:
    r: recorded file.
  """
  case = _Case(r)
  return [
    ("forward and gradients", case.forward),
    ("box weights", case.box_weights),
    ("greedy boxes", case.boxes),
  ]


class _Case:
  """Inputs of a recording, and results that several checks read."""

  def __init__(self, r: Recording):
    self.r = r
    self.text, self.mask = r.text("in/text")
    self.bins = r.meta["bins"]
    self.truth = jnp.asarray(r["in/boxes"])
    # The mask is f32[V], 0 or -10,000.
    self.locations = np.flatnonzero(np.asarray(r.state_dict["bbox_prob_mask"]).reshape(-1) == 0)
    self.prefix = jnp.full(
      (len(self.text), 1), int(r.state_dict["prefix_ids"].reshape(-1)[0]), jnp.int32
    )
    self.target = self.locations[np.asarray(boxes.quantize(self.truth, self.bins))]

  def _forward(
    self,
    m: MPlug,
    image: Float[Array, "batch size size 3"],
    text: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    ids: Int[Array, "batch positions"],
  ) -> dict[str, Array]:
    """Returns outputs by recorded name; "decoder_logits" f32[B, 5, V] have lowered words."""
    out = encode(m, image, text, mask)
    memory = m.memory(out["fusion_image"], out["fusion_text"], mask)
    return out | {
      "decoder_logits": task.lower_words(
        m.decode(ids, jnp.ones(ids.shape, bool), memory), self.locations
      )
    }

  @functools.cached_property
  def _online(self) -> tuple[tuple[Array, dict[str, Array]], Any]:
    """((loss with the released weights, outputs), gradients)."""
    ids = jnp.concatenate([self.prefix, jnp.asarray(self.target)], axis=1)
    valid = jnp.ones(len(ids), bool)

    def loss(params, *inputs):
      out: Any = self.r.model.apply({"params": params}, *inputs, ids, method=self._forward)
      token_loss = language_modeling.token_cross_entropy(out["decoder_logits"][:, :-1], ids[:, 1:])
      predicted_ids = out["decoder_logits"][:, :-1].argmax(-1)
      predicted = boxes.dequantize(predicted_ids - self.locations[0], self.bins)
      # The released loss multiplies every sample's tokens with every sample's box (docs/official.md
      # item 11).
      total, plain = (
        task.box_losses(token_loss, predicted, self.truth, valid, weighting).mean()
        for weighting in ("batch", "none")
      )
      return total, out | {
        "token_loss": token_loss,
        "loss_seq_unweighted": plain,
        "teacher_pred_ids": predicted_ids,
        "weight_bbox": task.coordinate_weights(predicted, self.truth),
        "weight_giou": task.overlap_weights(predicted, self.truth),
      }

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(
      self.r.params, self.r.image(), self.text, self.mask
    )

  def forward(self) -> Iterator[Row]:
    """Compares outputs and losses of the tokens."""
    r = self.r
    out = self._online[0][1]
    yield from r.compare({"target_ids": self.target}, EXACT)
    names = ("visual", "image_embeds", "text_embeds", "fusion_image", "fusion_text")
    yield from r.compare({name: out[name] for name in names}, TENSOR)
    name = "out/decoder_logits"
    if not r.lacks(name):
      words = np.setdiff1d(np.arange(out["decoder_logits"].shape[-1]), self.locations)
      for part, ids, tolerance in (
        (" (bins)", self.locations, LOGITS),
        (" (words)", words, _OUTSIDE),
      ):
        yield r.compare_part(
          name, part, np.asarray(out["decoder_logits"])[..., ids], r[name][..., ids], tolerance
        )
    yield from r.compare(
      {name: out[name] for name in ("token_loss", "loss_seq_unweighted")}, LOGITS
    )

  def box_weights(self) -> Iterator[Row]:
    """Compares the weights of the boxes, the weighted loss and its gradients."""
    r = self.r
    (loss, out), gradients = self._online
    yield from r.compare({"teacher_pred_ids": out["teacher_pred_ids"]}, EXACT)
    yield from r.compare({name: out[name] for name in ("weight_bbox", "weight_giou")}, TENSOR)
    yield from r.compare({"loss_seq": loss}, LOGITS)
    yield from r.compare_gradients(gradients, "loss_seq")

  def boxes(self) -> Iterator[Row]:
    """Compares the boxes that greedy decoding gives."""
    r = self.r
    if r.lacks("out/pred_ids", "out/pred_boxes"):
      return
    out = self._online[0][1]
    allowed = np.isin(np.arange(r.model.vocab_size), self.locations)

    @jax.jit
    def search(params, memory):
      cache = r.model.apply(
        {"params": params}, memory, 1, 1 + task.COORDINATES, method=MPlug.init_cache
      )
      step, _ = decoding_fns(r.model, params)
      return beam_search.greedy(
        step,
        cache,
        self.prefix,
        jnp.ones(len(self.text), jnp.int32),
        max_length=task.COORDINATES,
        eos_id=r.eos,
        pad_id=-1,
        allowed=jnp.asarray(allowed),
      )

    memory = r.model.memory(out["fusion_image"], out["fusion_text"], self.mask)
    ids = np.asarray(search(r.params, memory).tokens)[:, 0, 1:]
    yield from r.compare({"pred_ids": ids}, EXACT)
    yield from r.compare(
      {"pred_boxes": boxes.dequantize(ids - self.locations[0], self.bins)}, TENSOR
    )
