"""Retrieval: contrastive and matching losses with a momentum teacher and queues, three steps in a row; evaluation.

B images and texts, Q queue columns, E feature width. The online weights never change here; teacher and queues move on.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax import contrastive, losses, negatives, train_state
from mplug_jax.parity.recording import encode
from mplug_jax.parity.rows import EXACT, LOGITS, TENSOR, Tolerance

_NOT_AVERAGED = r"^(?!fusion_encoder)"  # docs/official.md item 5
_UNRANKED = -100.0  # score of pairs that evaluation does not fuse


def checks(r):
  """Recording -> [(name, function -> Rows)]."""
  case = _Case(r)
  return [*((step, functools.partial(case.step, step)) for step in case.steps), ("evaluation", case.evaluation),
          ("recall", case.recall)]


def _features(m, image, ids, mask):
  return m.contrastive_features(m.encode_image(image), m.encode_text(ids, mask))


def _step(params, model, teacher, batch, queues, alpha, given):
  """-> (contrastive + matching loss, {recorded name: output}).

  batch: (image, ids, mask, idx i32[B]). queues: {"image_queue", "text_queue": f32[E, Q], "idx_queue": i32[1, Q]}.
  given: i32[B] twice, the image given to each text and the text given to each image.
  """
  def apply(params, method, *args):
    return model.apply({"params": params}, *args, method=method)

  image, ids, mask, idx = batch
  encoded = apply(params, encode, image, ids, mask)
  image_feat, text_feat = apply(params, type(model).contrastive_features, encoded["image_embeds"], encoded["text_embeds"])
  image_m, text_m = apply(teacher, _features, image, ids, mask)
  i2t, t2i, sims = contrastive.image_text_losses(
      image_feat, text_feat, image_m, text_m, idx, jnp.ones(idx.shape, bool), queues, params["temp"]["value"], alpha)
  ita = (i2t.mean() + t2i.mean()) / 2

  rows = jnp.arange(len(idx))
  fused_negative = apply(params, type(model).fuse, *_pairs(encoded, mask, jnp.concatenate([given[0], rows]),
                                                           jnp.concatenate([rows, given[1]])))[1]
  logits = apply(params, type(model).match_logits, jnp.concatenate([encoded["fusion_text"], fused_negative]))
  labels = (jnp.arange(3 * len(idx)) < len(idx)).astype(jnp.int32)
  itm = losses.token_cross_entropy(logits, labels).mean()
  renamed = {name.replace("fusion_", "fusion_pos_"): x for name, x in encoded.items()}
  return ita + itm, renamed | {
      "image_feat": image_feat, "text_feat": text_feat, "image_feat_m": image_m, "text_feat_m": text_m, "sim_i2t": sims["i2t"],
      "sim_t2i": sims["t2i"], "fusion_neg_text": fused_negative, "itm_logits": logits, "loss_ita": ita, "loss_itm": itm}


def _pairs(encoded, mask, images, texts):
  """Arguments of MPlug.fuse for pairs of an image and a text, by their rows."""
  return encoded["text_embeds"][texts], mask[texts], encoded["image_embeds"][images]


class _Case:
  """A recording, and the teacher and the queues as the steps move them on."""

  def __init__(self, r):
    self.r = r
    self.steps = sorted({name.split("/")[1] for name in r.names("in/step")}, key=lambda name: int(name.removeprefix("step")))
    self.teacher = r.teacher
    self.queues = {name: jnp.asarray(r.state_dict[name], jnp.float32 if name in ("image_queue", "text_queue") else jnp.int32)
                   for name in ("image_queue", "text_queue", "idx_queue", "queue_ptr")}
    self.program = jax.jit(jax.value_and_grad(_step, has_aux=True), static_argnums=1)

  def step(self, step):
    r = self.r
    online = jax.tree.map(np.asarray, {name: r.params[name] for name in self.teacher})
    self.teacher = train_state.blend_ema(self.teacher, online, r.meta["momentum_used"], _NOT_AVERAGED)  # numpy: rounds as PyTorch
    how, idx = r.meta["cases"][step], jnp.asarray(r[f"in/{step}/idx"], jnp.int32)
    batch = r.image(f"in/{step}/image"), *r.text(f"in/{step}/text"), idx
    given = [jnp.asarray(r[f"out/{step}/neg_{side}_index"], jnp.int32) for side in ("image", "text")]
    (_, out), gradients = self.program(r.params, r.model, jax.tree.map(jnp.asarray, self.teacher), batch, self.queues,
                                       jnp.float32(how["alpha"] if how["distill"] else 0.0), given)
    self.queues = contrastive.enqueue(self.queues, out["image_feat_m"], out["text_feat_m"], idx, jnp.ones(idx.shape, bool))
    yield from self._rows(step, out)
    yield from self._negatives(step, how["negatives"], out, idx)
    yield from r.compare_gradients(gradients, f"{step}_ita_plus_itm")
    yield from r.compare_tree(self.teacher, f"momentum_after/{step}/", EXACT)
    after = {name: self.queues[name] for name in ("image_queue", "text_queue")}
    yield from r.compare(after, TENSOR, f"queue_after/{step}/")
    yield from r.compare({name: x for name, x in self.queues.items() if name not in after}, EXACT, f"queue_after/{step}/")

  def _rows(self, step, out):
    tolerances = {"itm_logits": LOGITS, "sim_i2t": LOGITS, "sim_t2i": LOGITS, "loss_ita": LOGITS, "loss_itm": LOGITS}
    for name, ours in out.items():
      yield from self.r.compare({name: ours}, tolerances.get(name, TENSOR), f"out/{step}/")

  def _negatives(self, step, how, out, idx):
    """The hardest ones where they were recorded without chance; else that none belongs to its own row."""
    r = self.r
    temperature = r.params["temp"]["value"]
    for side, features, others in (("image", out["text_feat"], out["image_feat_m"]), ("text", out["image_feat"], out["text_feat_m"])):
      name = f"neg_{side}_index"
      if how == "argmax":
        hardest = negatives.draw(features, others, idx, jnp.ones(idx.shape, bool), temperature, group=len(idx))
        yield from r.compare({name: hardest}, EXACT, f"out/{step}/")
      else:
        own = idx[r[f"out/{step}/{name}"]] == idx
        yield r.compare_part(f"out/{step}/{name}", " (drawn: of another id)", own, np.zeros(own.shape), EXACT)

  @functools.cached_property
  def _evaluated(self):
    """Features, similarities and match scores of the k most similar pairs, both directions, by recorded name."""
    r = self.r
    k = r.meta["eval"]["k_test"]

    @jax.jit
    def embed(params, image, ids, mask):
      def forward(m):
        encoded = {"image_embeds": m.encode_image(image), "text_embeds": m.encode_text(ids, mask)}
        return encoded, m.contrastive_features(*encoded.values())
      return r.model.apply({"params": params}, method=forward)

    @jax.jit
    def match(params, pairs):
      return r.model.apply({"params": params}, method=lambda m: m.match_logits(m.fuse(*pairs)[1])[:, 1])

    ids, mask = r.text("in/eval/text")
    encoded, (image_feat, text_feat) = embed(r.params, r.image("in/eval/image"), ids, mask)
    sims = np.asarray(image_feat @ text_feat.T)
    scores = [np.full(s.shape, _UNRANKED, np.float32) for s in (sims, sims.T)]
    best = [np.asarray(jax.lax.top_k(s, min(k, s.shape[1]))[1]) for s in (sims, sims.T)]
    rows = [np.repeat(np.arange(len(b)), b.shape[1]) for b in best]
    images, texts = np.concatenate([rows[0], best[1].reshape(-1)]), np.concatenate([best[0].reshape(-1), rows[1]])
    logits = np.split(np.asarray(match(r.params, _pairs(encoded, mask, images, texts))), [rows[0].size])
    for score, row, column, logit in zip(scores, rows, best, logits):
      score[row, column.reshape(-1)] = logit
    return {"image_feat": image_feat, "text_feat": text_feat, "sims_matrix": sims, "score_i2t": scores[0], "score_t2i": scores[1]}

  def evaluation(self):
    r = self.r
    if r.lacks(*(f"out/eval/{name}" for name in ("image_feat", "text_feat", "sims_matrix", "score_i2t", "score_t2i"))):
      return
    for name, ours in self._evaluated.items():
      yield from r.compare({name: ours}, LOGITS if name.startswith("score") else TENSOR, "out/eval/")

  def recall(self):
    """Recorded recall against the least and the most that any order of equal scores gives: the official order of ties is chance."""
    recorded = self.r.meta.get("eval", {}).get("metrics")
    if not recorded:
      self.r.skip("meta.eval.metrics", "not in the file")
      return
    i2t, t2i = (self._evaluated[name] for name in ("score_i2t", "score_t2i"))
    owned = np.arange(len(t2i)) % len(i2t) == np.arange(len(i2t))[:, None]  # text t belongs to image t % images
    bounds = {}
    for side, scores, correct in (("txt", i2t, owned), ("img", t2i, owned.T)):
      ranks = _ranks(scores, correct)
      for depth in (1, 5, 10):
        bounds[f"{side}_r{depth}"] = 100 * np.array([(rank < depth).mean() for rank in ranks])
      bounds[f"{side}_r_mean"] = np.mean([bounds[f"{side}_r{depth}"] for depth in (1, 5, 10)], axis=0)
    bounds["r_mean"] = (bounds["txt_r_mean"] + bounds["img_r_mean"]) / 2
    names = [name for name in bounds if name in recorded]
    values = np.array([recorded[name] for name in names])
    ours = np.array([np.clip(recorded[name], *bounds[name]) for name in names])
    yield self.r.compare_part("meta.eval.metrics", "", ours, values, Tolerance(1e-6))


def _ranks(scores, correct):
  """Rank (from 0) of the first correct column of each row, when ties go against it and when they go for it: two f[rows].

  scores: f32[rows, columns]. correct: bool[rows, columns]; a row without any has rank inf.
  """
  best = np.where(correct, scores, -np.inf).max(1, keepdims=True)
  found = correct.any(1)
  return np.where(found, (~correct & (scores >= best)).sum(1), np.inf), np.where(found, (scores > best).sum(1), np.inf)
