"""VQA: encoders to answer losses, momentum distillation, beams, ranking, optimizer updates.

B questions and images, A answers in all (answer a belongs to question owner[a]), T answer tokens, V
vocabulary.
"""

import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from mplug_jax import optim
from mplug_jax.decoding import answer_ranking as ranking
from mplug_jax.losses import language_modeling
from mplug_jax.models.bert import Memory
from mplug_jax.models.mplug import MPlug
from mplug_jax.parity import beams
from mplug_jax.parity.recording import Recording, encode
from mplug_jax.parity.rows import EXACT, LOGITS, TENSOR, Check, Row, Tolerance, compare
from mplug_jax.tasks import vqa as vqa_task
from mplug_jax.training import state as train_state

_NOT_AVERAGED = r"^(?!fusion_encoder)"  # docs/official.md item 5
_UPDATED = Tolerance(1e-4)  # of parameters after a few updates of 1e-3


def checks(r: Recording) -> list[Check]:
  """Returns the checks of a recording.

  Args:
    r: recorded file.
  """
  case = _Case(r)
  return [
    ("forward and gradients", case.forward),
    ("momentum teacher", case.momentum),
    ("distillation", case.distillation),
    *beams.checks(r, case),
    ("ranking", case.ranking),
    ("optimizer updates", case.updates),
  ]


def _forward(
  m: MPlug,
  image: Float[Array, "batch size size 3"],
  question: Int[Array, "batch length"],
  question_mask: Bool[Array, "batch length"],
  ids: Int[Array, "answers tokens"],
  mask: Bool[Array, "answers tokens"],
  owner: Int[Array, " answers"],
) -> dict[str, Array]:
  """Returns outputs up to the logits f32[A, T, V] by recorded name."""
  out = encode(m, image, question, question_mask)
  memory = m.memory(out["fusion_image"][owner], out["fusion_text"][owner], question_mask[owner])
  return out | {"decoder_logits": m.decode(ids, mask, memory)}


class _Case:
  """Inputs of a recording, and results that several checks read."""

  def __init__(self, r: Recording):
    self.r = r
    self.question, self.question_mask = r.text("in/question")
    self.ids, mask = r.text("in/answer")
    self.rows = len(r["in/k"])
    owner = jnp.asarray(np.repeat(np.arange(self.rows), r["in/k"]))
    self.inputs = r.image(), self.question, self.question_mask, self.ids, mask, owner
    self.weights = jnp.asarray(r["in/weights"])
    self.prompt = jnp.full((self.rows, 1), r.bos, jnp.int32)

  @functools.cached_property
  def _program(self) -> jax.stages.Wrapped:
    """(params, teacher logits, alpha, ...) -> ((loss, outputs), gradients), for all losses."""

    def loss(params, teacher_logits, alpha, weights, inputs):
      out: Any = self.r.model.apply({"params": params}, *inputs, method=_forward)
      # The released loss normalizes the student over time, axis 1 (docs/official.md item 7).
      answer_loss = language_modeling.answer_cross_entropy(
        out["decoder_logits"], inputs[3], self.r.pad, teacher_logits, alpha, axis=1
      )
      return (weights * answer_loss).sum() / self.rows, out | {"answer_loss": answer_loss}

    return jax.jit(jax.value_and_grad(loss, has_aux=True))

  def run(
    self,
    params: Any,
    teacher_logits: Float[Array, "answers tokens vocabulary"] | None = None,
    alpha: float = 0.0,
  ) -> tuple[Array, dict[str, Array], Any]:
    """Returns the loss, {name: output} and gradients."""
    if teacher_logits is None:
      teacher_logits = jnp.zeros(self.ids.shape + (self.r.model.vocab_size,))
    (loss, out), gradients = self._program(
      params, teacher_logits, jnp.float32(alpha), self.weights, self.inputs
    )
    return loss, out, gradients

  @functools.cached_property
  def online(self) -> tuple[Array, dict[str, Array], Any]:
    """Results with the online weights, see `run`."""
    return self.run(self.r.params)

  @property
  def memory(self) -> Memory:
    """Memory of the decoder."""
    out = self.online[1]
    return self.r.model.memory(out["fusion_image"], out["fusion_text"], self.question_mask)

  def forward(self) -> Iterator[Row]:
    """Compares outputs, loss and gradients."""
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
  def _moved_teacher(self) -> Any:
    """The teacher after one update of the averages, which precedes its forward pass.

    In NumPy, which fuses nothing and so rounds as PyTorch does.
    """
    r = self.r
    online = jax.tree.map(np.asarray, {name: r.params[name] for name in r.teacher})
    return train_state.blend_ema(r.teacher, online, r.meta["config"]["momentum"], _NOT_AVERAGED)

  @functools.cached_property
  def _teacher_outputs(self) -> dict[str, Array]:
    return self.run(jax.tree.map(jnp.asarray, self._moved_teacher))[1]

  def momentum(self) -> Iterator[Row]:
    """Compares the teacher after an update, and its outputs."""
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

  def distillation(self) -> Iterator[Row]:
    """Compares the released loss, whose teacher has weight 0, and losses with other weights."""
    r = self.r
    prefix = "loss_distill_alpha"
    tags = {name[4:]: float(name[4 + len(prefix) :]) for name in r.names(f"out/{prefix}")}
    if not r.lacks("out/loss_distill_as_released"):
      tags["loss_distill_as_released"] = 0.0
    for tag, alpha in tags.items():
      loss, out, gradients = self.run(r.params, self._teacher_outputs["decoder_logits"], alpha)
      if alpha:
        yield from r.compare({f"answer_{tag}": out["answer_loss"]}, LOGITS)
      yield from r.compare({tag: loss}, LOGITS)
      yield from r.compare_gradients(gradients, tag)

  def ranking(self) -> Iterator[Row]:
    """Compares the ranked answers and their probabilities."""
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

  def updates(self) -> Iterator[Row]:
    """Compares losses and parameters of updates by AdamW with the official groups."""
    r = self.r
    if r.lacks("opt/losses"):
      return
    settings = {
      match[1]: float(match[2])
      for match in re.finditer(r"\b(lr1|lr2|weight_decay)=([\d.e+-]+)", r.meta["opt"])
    }
    config = {
      "lr": settings["lr1"],
      "visual_lr": settings["lr2"],
      "weight_decay": settings["weight_decay"],
      "groups": "official",
      "schedule": {"name": "constant"},
    }
    count = len(r["opt/losses"]) - 1
    tx, _ = optim.make(config, r.params, count + 1, count + 1)

    @jax.jit
    def update(gradients, state, params):
      changes, state = tx.update(gradients, state, params)
      return optax.apply_updates(params, changes), state

    params = r.params
    state = jax.jit(tx.init)(params)
    values = []
    for _ in range(count):
      loss, _, gradients = self.run(params)
      params, state = update(gradients, state, params)
      values.append(loss)
    yield from r.compare(
      {"losses": np.stack([*values, self.run(params)[0]])}, Tolerance(1e-3), "opt/"
    )
    farthest = count * max(settings["lr1"], settings["lr2"])
    yield from self._after(params, f"opt/after{count}/", farthest)

  def _after(self, params: Any, prefix: str, farthest: float) -> Iterator[Row]:
    """Compares parameters after updates that moved no number further than about `farthest`.

    Adam divides a gradient by its size, so that a number moves by the relative error of the
    gradient. Where that error, as measured in the first gradient, is so large that the direction is
    unclear, two correct programs differ by up to twice the distance.
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
