"""Retrieval: three consecutive steps with a momentum teacher and queues, and evaluation.

B images and texts, Q queue columns, E feature width. The online weights never change here; teacher
and queues do.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mplug_jax.evaluators import reranking
from mplug_jax.losses import contrastive, hard_negatives
from mplug_jax.metrics import recall
from mplug_jax.models.mplug import MPlug
from mplug_jax.parity.recording import Recording, encode
from mplug_jax.parity.rows import EXACT, LOGITS, TENSOR, Check, Row, Tolerance
from mplug_jax.tasks import matching
from mplug_jax.training import state

_NOT_AVERAGED = r"^(?!fusion_encoder)"  # docs/official.md item 5
_UNRANKED = -100.0  # score of pairs that evaluation does not fuse
_LOGITS = ("itm_logits", "sim_i2t", "sim_t2i", "loss_ita", "loss_itm")


def checks(r: Recording) -> list[Check]:
  """Returns the checks of a recording.

  Args:
    r: recorded file.
  """
  case = _Case(r)
  return [
    *((step, functools.partial(case.step, step)) for step in case.steps),
    ("evaluation", case.evaluation),
    ("recall", case.recall),
  ]


def _features(
  m: MPlug,
  image: Float[Array, "batch size size 3"],
  ids: Int[Array, "batch length"],
  mask: Bool[Array, "batch length"],
) -> Any:
  return m.contrastive_features(m.encode_image(image), m.encode_text(ids, mask))


def _step(
  params: Any,
  model: MPlug,
  teacher: Any,
  batch: tuple[Array, Array, Array, Array],
  queues: dict[str, Array],
  alpha: Array,
  negatives: Sequence[Array],
) -> tuple[Array, dict[str, Array]]:
  """Computes the losses of a step.

  Args:
    params: online weights.
    model: model without parameters.
    teacher: momentum weights.
    batch: (image, ids, mask, idx i32[B]).
    queues: {"image_queue", "text_queue": f32[E, Q], "idx_queue": i32[1, Q]}.
    alpha: weight of the teacher.
    negatives: i32[B] twice, the image paired with each text and the text paired with each image.

  Returns:
    Contrastive + matching loss, and {recorded name: output}.
  """

  def apply(params: Any, method: Any, *args: Any) -> Any:
    return model.apply({"params": params}, *args, method=method)

  image, ids, mask, idx = batch
  temperature = params["temp"]["value"]
  encoded = apply(params, encode, image, ids, mask)
  image_feat, text_feat = apply(
    params, type(model).contrastive_features, encoded["image_embeds"], encoded["text_embeds"]
  )
  image_m, text_m = apply(teacher, _features, image, ids, mask)
  features = image_feat, text_feat, image_m, text_m
  valid = jnp.ones(idx.shape, bool)
  i2t, t2i, _ = contrastive.image_text_losses(*features, idx, valid, queues, temperature, alpha)
  ita = (i2t.mean() + t2i.mean()) / 2

  images, texts = negatives
  mates = encoded["image_embeds"][images], encoded["text_embeds"][texts], mask[texts]
  logits, fused, *_ = apply(
    params, matching.match, encoded["image_embeds"], encoded["text_embeds"], mask, *mates
  )
  itm = matching.matching_losses(logits).mean()
  renamed = {name.replace("fusion_", "fusion_pos_"): x for name, x in encoded.items()}
  return ita + itm, renamed | {
    "image_feat": image_feat,
    "text_feat": text_feat,
    "image_feat_m": image_m,
    "text_feat_m": text_m,
    "sim_i2t": contrastive.similarities(image_feat, text_m, queues["text_queue"], temperature),
    "sim_t2i": contrastive.similarities(text_feat, image_m, queues["image_queue"], temperature),
    "fusion_neg_text": jnp.concatenate([fused[:, 2], fused[:, 1]]),
    "itm_logits": jnp.concatenate([logits[:, 0], logits[:, 2], logits[:, 1]]),
    "loss_ita": ita,
    "loss_itm": itm,
  }


class _Case:
  """A recording, and the teacher and the queues, which the steps update."""

  def __init__(self, r: Recording):
    self.r = r
    self.steps = sorted(
      {name.split("/")[1] for name in r.names("in/step")},
      key=lambda name: int(name.removeprefix("step")),
    )
    self.teacher = r.teacher
    self.queues = {
      name: jnp.asarray(
        r.state_dict[name], jnp.float32 if name in ("image_queue", "text_queue") else jnp.int32
      )
      for name in ("image_queue", "text_queue", "idx_queue", "queue_ptr")
    }
    self.program = jax.jit(jax.value_and_grad(_step, has_aux=True), static_argnums=1)

  def step(self, step: str) -> Iterator[Row]:
    """Compares a step: outputs, negatives, gradients, teacher and queues after it."""
    r = self.r
    online = jax.tree.map(np.asarray, {name: r.params[name] for name in self.teacher})
    # In NumPy, which rounds as PyTorch does.
    self.teacher = state.blend_ema(self.teacher, online, r.meta["momentum_used"], _NOT_AVERAGED)
    settings = r.meta["cases"][step]
    idx = jnp.asarray(r[f"in/{step}/idx"], jnp.int32)
    batch = r.image(f"in/{step}/image"), *r.text(f"in/{step}/text"), idx
    negatives = [
      jnp.asarray(r[f"out/{step}/neg_{side}_index"], jnp.int32) for side in ("image", "text")
    ]
    (_, out), gradients = self.program(
      r.params,
      r.model,
      jax.tree.map(jnp.asarray, self.teacher),
      batch,
      self.queues,
      jnp.float32(settings["alpha"] if settings["distill"] else 0.0),
      negatives,
    )
    self.queues = contrastive.enqueue(
      self.queues, out["image_feat_m"], out["text_feat_m"], idx, jnp.ones(idx.shape, bool)
    )
    for name, ours in out.items():
      yield from r.compare({name: ours}, LOGITS if name in _LOGITS else TENSOR, f"out/{step}/")
    yield from self._negatives(step, settings["negatives"], out, idx)
    yield from r.compare_gradients(gradients, f"{step}_ita_plus_itm")
    yield from r.compare_tree(self.teacher, f"momentum_after/{step}/", EXACT)
    after = {name: self.queues[name] for name in ("image_queue", "text_queue")}
    yield from r.compare(after, TENSOR, f"queue_after/{step}/")
    yield from r.compare(
      {name: x for name, x in self.queues.items() if name not in after},
      EXACT,
      f"queue_after/{step}/",
    )

  def _negatives(
    self, step: str, drawing: str, out: Mapping[str, Array], idx: Int[Array, " batch"]
  ) -> Iterator[Row]:
    """Compares the hardest negatives if they were recorded without randomness.

    Otherwise checks that no negative belongs to its row.
    """
    r = self.r
    temperature = r.params["temp"]["value"]
    for side, features, others in (
      ("image", out["text_feat"], out["image_feat_m"]),
      ("text", out["image_feat"], out["text_feat_m"]),
    ):
      name = f"neg_{side}_index"
      if drawing == "argmax":
        hardest = hard_negatives.draw(
          features, others, idx, jnp.ones(idx.shape, bool), temperature, group=len(idx)
        )
        yield from r.compare({name: hardest}, EXACT, f"out/{step}/")
      else:
        same_id = idx[r[f"out/{step}/{name}"]] == idx
        yield r.compare_part(
          f"out/{step}/{name}", " (drawn: of another id)", same_id, np.zeros(same_id.shape), EXACT
        )

  @functools.cached_property
  def _evaluated(self) -> dict[str, Any]:
    """Features, similarities and match scores of the k most similar pairs, by recorded name."""
    r = self.r
    k = r.meta["eval"]["k_test"]

    @jax.jit
    def embed(params, image, ids, mask):
      def forward(m):
        encoded = {"image_embeds": m.encode_image(image), "text_embeds": m.encode_text(ids, mask)}
        return encoded, m.contrastive_features(*encoded.values())

      return r.model.apply({"params": params}, method=forward)

    @jax.jit
    def memory(params, image):
      return r.model.apply({"params": params}, image, method=matching.image_memory)

    @jax.jit
    def match(params, memory, tokens, mask, texts):
      bank = {"tokens": tokens, "text_mask": mask}
      return r.model.apply(
        {"params": params}, memory, bank, texts, None, "none", method=matching.match_scores
      )

    ids, mask = r.text("in/eval/text")
    encoded, (image_feat, text_feat) = embed(r.params, r.image("in/eval/image"), ids, mask)
    images, texts = (np.arange(len(x)) for x in (image_feat, text_feat))
    features = np.asarray(image_feat), np.asarray(text_feat)
    owner = texts % len(images)  # As recorded.
    best = (
      reranking.nearest(features[0], features[1], k, images, owner).ids,
      reranking.nearest(features[1], features[0], k, owner, images).ids,
    )
    table = reranking.PairTable(*best)
    blocks = [(images, memory(r.params, encoded["image_embeds"]))]
    scores = reranking.score_pairs(
      table,
      blocks,
      lambda block, rows: np.asarray(match(r.params, block, encoded["text_embeds"], mask, rows)),
      width=4,
    )
    of_images, of_texts = (
      np.full(shape, _UNRANKED, np.float32)
      for shape in ((len(images), len(texts)), (len(texts), len(images)))
    )
    np.put_along_axis(of_images, best[0], scores[table.positions(images[:, None], best[0])], axis=1)
    np.put_along_axis(of_texts, best[1], scores[table.positions(best[1], texts[:, None])], axis=1)
    return {
      "image_feat": image_feat,
      "text_feat": text_feat,
      "sims_matrix": np.asarray(image_feat @ text_feat.T),
      "score_i2t": of_images,
      "score_t2i": of_texts,
    }

  def evaluation(self) -> Iterator[Row]:
    """Compares features, similarities and scores of evaluation."""
    r = self.r
    names = ("image_feat", "text_feat", "sims_matrix", "score_i2t", "score_t2i")
    if r.lacks(*(f"out/eval/{name}" for name in names)):
      return
    for name, ours in self._evaluated.items():
      yield from r.compare(
        {name: ours}, LOGITS if name.startswith("score") else TENSOR, "out/eval/"
      )

  def recall(self) -> Iterator[Row]:
    """Compares recall with the range over all orders of equal scores.

    The official order of ties is random.
    """
    recorded = self.r.meta.get("eval", {}).get("metrics")
    if not recorded:
      self.r.skip("meta.eval.metrics", "not in the file")
      return
    i2t, t2i = (self._evaluated[name] for name in ("score_i2t", "score_t2i"))
    # Text t belongs to image t % images.
    correct = np.arange(len(t2i)) % len(i2t) == np.arange(len(i2t))[:, None]
    # Ranks of each query's best correct candidate, with ties before it and with ties after it.
    least = recall.recalls(recall.ranks(i2t, correct), recall.ranks(t2i, correct.T))
    most = recall.recalls(_best_ranks(i2t, correct), _best_ranks(t2i, correct.T))
    bounds = {name: (least[name], most[name]) for name in least}
    names = [name for name in bounds if name in recorded]
    values = np.array([recorded[name] for name in names])
    ours = np.array([np.clip(recorded[name], *bounds[name]) for name in names])
    yield self.r.compare_part("meta.eval.metrics", "", ours, values, Tolerance(1e-6))


def _best_ranks(
  scores: Float[np.ndarray, "queries candidates"], correct: Bool[np.ndarray, "queries candidates"]
) -> Int[np.ndarray, " queries"]:
  """Returns the rank of each query's best correct candidate, before those of equal score."""
  return (scores > np.where(correct, scores, -np.inf).max(1, keepdims=True)).sum(1)
