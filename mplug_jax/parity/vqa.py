"""VQA: encoders to answer losses, momentum distillation, beams, ranking, optimizer updates.

B questions and images, A answers in all (answer a belongs to question owner[a]), T answer tokens, V
vocabulary.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mplug_jax import optim
from mplug_jax.decoding import answer_ranking as ranking
from mplug_jax.losses import language_modeling
from mplug_jax.parity import beams
from mplug_jax.parity.recording import encode
from mplug_jax.parity.rows import EXACT, LOGITS, TENSOR, Tolerance, compare
from mplug_jax.tasks import vqa as vqa_task
from mplug_jax.training import state as train_state

_NOT_AVERAGED = r"^(?!fusion_encoder)"  # docs/official.md item 5
_UPDATED = Tolerance(1e-4)  # of parameters after a few updates of 1e-3


def checks(r):
  """Recording -> [(name, function -> Rows)]."""
  case = _Case(r)
  return [
    ("forward and gradients", case.forward),
    ("momentum teacher", case.momentum),
    ("distillation", case.distillation),
    *beams.checks(r, case),
    ("ranking", case.ranking),
    ("optimizer updates", case.updates),
  ]


def _forward(m, image, question, question_mask, ids, mask, owner):
  """-> what was recorded up to the logits f32[A, T, V], by name."""
  out = encode(m, image, question, question_mask)
  memory = m.memory(out["fusion_image"][owner], out["fusion_text"][owner], question_mask[owner])
  return out | {"decoder_logits": m.decode(ids, mask, memory)}


class _Case:
  """A recording's inputs, and what several checks share."""

  def __init__(self, r):
    self.r = r
    self.question, self.question_mask = r.text("in/question")
    self.ids, mask = r.text("in/answer")
    self.rows = len(r["in/k"])
    owner = jnp.asarray(np.repeat(np.arange(self.rows), r["in/k"]))
    self.inputs = r.image(), self.question, self.question_mask, self.ids, mask, owner
    self.weights = jnp.asarray(r["in/weights"])
    self.prompt = jnp.full((self.rows, 1), r.bos, jnp.int32)

  @functools.cached_property
  def _program(self):
    """(params, teacher logits, alpha) -> ((loss, outputs), gradients): one program for every loss and for the teacher's forward."""

    def loss(params, teacher_logits, alpha, weights, inputs):
      out = self.r.model.apply({"params": params}, *inputs, method=_forward)
      # The released loss normalises the student over time, axis 1 (docs/official.md item 7).
      answer_loss = language_modeling.answer_cross_entropy(
        out["decoder_logits"], inputs[3], self.r.pad, teacher_logits, alpha, axis=1
      )
      return (weights * answer_loss).sum() / self.rows, out | {"answer_loss": answer_loss}

    return jax.jit(jax.value_and_grad(loss, has_aux=True))

  def run(self, params, teacher_logits=None, alpha=0.0):
    """-> (loss, {name: output}, gradients)."""
    if teacher_logits is None:
      teacher_logits = jnp.zeros(self.ids.shape + (self.r.model.vocab_size,))
    (loss, out), gradients = self._program(
      params, teacher_logits, jnp.float32(alpha), self.weights, self.inputs
    )
    return loss, out, gradients

  @functools.cached_property
  def online(self):
    return self.run(self.r.params)

  @functools.cached_property
  def memory(self):
    out = self.online[1]
    return self.r.model.memory(out["fusion_image"], out["fusion_text"], self.question_mask)

  def forward(self):
    r = self.r
    loss, out, gradients = self.online
    answer_loss, logits = out["answer_loss"], out["decoder_logits"]
    tensors = {name: x for name, x in out.items() if name not in ("answer_loss", "decoder_logits")}
    mask = np.concatenate(
      [np.ones(out["fusion_image"].shape[:2], bool), self.question_mask], axis=1
    )
    yield from r.compare(
      tensors
      | {"decoder_states": np.concatenate([out["fusion_image"], out["fusion_text"]], axis=1)},
      TENSOR,
    )
    yield from r.compare({"decoder_states_mask": mask}, EXACT)
    yield from r.compare({"decoder_logits": logits}, LOGITS)
    yield from r.compare({"answer_loss": answer_loss, "loss": loss}, LOGITS)
    yield from r.compare_gradients(gradients, "loss")

  @functools.cached_property
  def _moved_teacher(self):
    """The teacher after one blend, which comes before its forward pass.

    Numpy, where nothing is fused and rounding is PyTorch's.
    """
    r = self.r
    online = jax.tree.map(np.asarray, {name: r.params[name] for name in r.teacher})
    return train_state.blend_ema(r.teacher, online, r.meta["config"]["momentum"], _NOT_AVERAGED)

  @functools.cached_property
  def _teacher_outputs(self):
    return self.run(jax.tree.map(jnp.asarray, self._moved_teacher))[1]

  def momentum(self):
    r = self.r
    if not r.names("momentum_after/") and not r.names("out/m_"):
      r.skip("momentum_after/", "not in the file")
      return
    yield from r.compare_tree(self._moved_teacher, "momentum_after/", EXACT)
    out = self._teacher_outputs
    yield from r.compare(
      {f"m_{name}": out[name] for name in out if name not in ("answer_loss", "decoder_logits")},
      TENSOR,
    )
    yield from r.compare({"m_logits": out["decoder_logits"][:, :-1]}, LOGITS)

  def distillation(self):
    """The released loss, whose weight alpha of the teacher is 0, and the recorded ones with another."""
    r, prefix = self.r, "loss_distill_alpha"
    tags = {name[4:]: float(name[4 + len(prefix) :]) for name in r.names(f"out/{prefix}")}
    if not r.lacks("out/loss_distill_as_released"):
      tags["loss_distill_as_released"] = 0.0
    for tag, alpha in tags.items():
      loss, out, gradients = self.run(r.params, self._teacher_outputs["decoder_logits"], alpha)
      if alpha:
        yield from r.compare({f"answer_{tag}": out["answer_loss"]}, LOGITS)
      yield from r.compare({tag: loss}, LOGITS)
      yield from r.compare_gradients(gradients, tag)

  def ranking(self):
    r = self.r
    if r.lacks("out/rank_topk_ids", "out/rank_topk_probs"):
      return
    top_k = r["out/rank_topk_ids"].shape[1]

    @jax.jit
    def rank(params, memory, candidates):
      score = vqa_task.score_fn(r.model, params, memory, pad_id=r.pad)
      return ranking.rank(score, self.rows, candidates, top_k=top_k, pad_id=r.pad)

    ours = rank(r.params, self.memory, jnp.asarray(r["in/cand_ids"], jnp.int32))
    yield from r.compare({"rank_topk_ids": ours.answers}, EXACT)
    yield from r.compare({"rank_topk_probs": ours.probabilities}, TENSOR)

  def updates(self):
    """AdamW with the official groups, rates as `meta` says: the loss before each update and after the last, parameters after it."""
    r = self.r
    if r.lacks("opt/losses"):
      return
    said = {
      name: float(re.search(rf"\b{name}=([\d.e+-]+)", r.meta["opt"])[1])
      for name in ("lr1", "lr2", "weight_decay")
    }
    config = {
      "lr": said["lr1"],
      "visual_lr": said["lr2"],
      "weight_decay": said["weight_decay"],
      "groups": "official",
      "schedule": {"name": "constant"},
    }
    count = len(r["opt/losses"]) - 1
    tx, _ = optim.make(config, r.params, count + 1, count + 1)

    @jax.jit
    def update(gradients, state, params):
      changes, state = tx.update(gradients, state, params)
      return optax.apply_updates(params, changes), state

    params, state = r.params, jax.jit(tx.init)(r.params)
    values = []
    for _ in range(count):
      loss, _, gradients = self.run(params)
      params, state = update(gradients, state, params)
      values.append(loss)
    yield from r.compare(
      {"losses": np.stack([*values, self.run(params)[0]])}, Tolerance(1e-3), "opt/"
    )
    yield from self._after(params, f"opt/after{count}/", count * max(said["lr1"], said["lr2"]))

  def _after(self, params, prefix, farthest):
    """Parameters after updates that moved no number further than about `farthest` -> Rows.

    Adam divides a gradient by its size, so a number moves by the gradient's relative error. Where
    that error, as measured in the first gradient, is too large to tell the direction, two right
    programs differ by up to twice the way.
    """
    gradients = {
      key.removeprefix("grad/loss/"): (np.abs(recorded), np.abs(ours - recorded).max())
      for key, ours, recorded in self.r.pairs(self.online[2], "grad/loss/")
    }
    for key, ours, recorded in self.r.pairs(params, prefix):
      row = compare(key, ours, recorded, _UPDATED)._replace(shape=self.r[key].shape)
      size, error = gradients.get(key.removeprefix(prefix), (np.inf, 0.0))
      unclear = size * _UPDATED.absolute < error * farthest
      if row.passed or not np.any(unclear):
        yield row
        continue
      yield compare(f"{key} (clear gradient)", ours[~unclear], recorded[~unclear], _UPDATED)
      yield compare(
        f"{key} (gradient is rounding)", ours[unclear], recorded[unclear], Tolerance(2 * farthest)
      )
