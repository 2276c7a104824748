"""Our model and VQA against arrays recorded from the official PyTorch code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest

from mplug_jax import losses, optim, ranking, train_state
from mplug_jax.models.bert import Memory
from mplug_jax.tasks import vqa as vqa_task

PATHS = parity.recordings("vqa")
vqa_files = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)


def answer_logits(m, image, question, question_mask, ids, mask, owner):
  """Teacher-forced logits; answer a belongs to question owner[a]."""
  out = parity.encode(m, image, question, question_mask)
  memory = m.memory(out["fusion_image"][owner], out["fusion_text"][owner], question_mask[owner])
  return m.decode(ids, mask, memory)


class Vqa:
  """A VQA recording with its inputs as our arrays."""

  def __init__(self, path):
    self.r = r = parity.Recording(path)
    self.question = jnp.asarray(r["in/question_ids"], jnp.int32), jnp.asarray(r["in/question_mask"]) > 0
    self.ids, self.mask = jnp.asarray(r["in/answer_ids"], jnp.int32), jnp.asarray(r["in/answer_mask"]) > 0
    self.owner = jnp.asarray(np.repeat(np.arange(len(r["in/k"])), r["in/k"]))
    self.weights = jnp.asarray(r["in/weights"])
    self.args = (r.image(), *self.question, self.ids, self.mask, self.owner)

  def answer_losses(self, params, **distill):
    logits = self.r.model.apply({"params": params}, *self.args, method=answer_logits)
    return losses.answer_cross_entropy(logits, self.ids, 0, **distill)

  def loss(self, params, **distill):
    return (self.weights * self.answer_losses(params, **distill)).sum() / len(self.r["in/k"])

  def memory(self):
    r = self.r
    states, mask = jnp.asarray(r["out/decoder_states"]), jnp.asarray(r["out/decoder_states_mask"]) > 0
    return Memory((states,), (mask,))


@pytest.fixture(scope="module")
def cases():
  return {path: Vqa(path) for path in PATHS}


@vqa_files
def test_encoders_fusion_and_decoder(path, cases):
  case = cases[path]
  for name, ours in case.r.apply(case.r.params, parity.encode, *case.args[:3]).items():
    parity.close(ours, case.r[f"out/{name}"], name=name)
  logits = case.r.apply(case.r.params, answer_logits, *case.args)
  parity.close(logits, case.r["out/decoder_logits"], 1e-4, "logits")
  parity.close(jax.jit(case.answer_losses)(case.r.params), case.r["out/answer_loss"], 1e-4, "answer_loss")


@vqa_files
def test_loss_and_gradients(path, cases):
  case = cases[path]
  loss, gradients = jax.jit(jax.value_and_grad(case.loss))(case.r.params)
  assert abs(float(loss) - case.r["out/loss"]) <= 1e-4
  case.r.compare_gradients(gradients, "grad/loss/", "loss")


@vqa_files
def test_momentum_distillation(path, cases):
  """The teacher moves before its forward pass, without its fusion encoder; both axes of the student's softmax."""
  case = cases[path]
  teacher = train_state.blend_ema(case.r.teacher, case.r.params, 0.995, r"^(?!fusion_encoder)")
  case.r.compare_values(teacher, "momentum_after/", 1e-6)
  logits = case.r.apply(teacher, answer_logits, *case.args)
  parity.close(logits[:, :-1], case.r["out/m_logits"], 1e-4, "m_logits")

  def loss(params):
    return case.loss(params, teacher_logits=logits, alpha=0.4, axis=1)

  value, gradients = jax.jit(jax.value_and_grad(loss))(case.r.params)
  assert abs(float(value) - case.r["out/loss_distill_alpha0.4"]) <= 2e-4
  case.r.compare_gradients(gradients, "grad/loss_distill_alpha0.4/", "loss_distill_alpha0.4")


@vqa_files
def test_beam_search(path, cases):
  case = cases[path]
  parity.check_beams(case.r, case.memory(), jnp.full((3, 1), 101, jnp.int32))


@vqa_files
def test_ranking(path, cases):
  case = cases[path]
  candidates = jnp.asarray(case.r["in/cand_ids"], jnp.int32)

  @jax.jit
  def rank(params):
    score = vqa_task.score_fn(case.r.model, params, case.memory(), pad_id=0)
    return ranking.rank(score, 3, candidates, top_k=4, pad_id=0)

  ours = rank(case.r.params)
  np.testing.assert_array_equal(ours.answers, case.r["out/rank_topk_ids"])
  parity.close(ours.probabilities, case.r["out/rank_topk_probs"], 2e-5)


@vqa_files
def test_three_updates(path, cases):
  """AdamW with the official groups: losses before each of four steps, parameters after three."""
  case = cases[path]
  config = {"lr": 1e-3, "visual_lr": 5e-4, "weight_decay": 0.02, "groups": "official", "schedule": {"name": "constant"}}
  tx, _ = optim.make(config, case.r.params, 4, 4)
  params, state, values = case.r.params, tx.init(case.r.params), []

  @jax.jit
  def step(params, state):
    loss, gradients = jax.value_and_grad(case.loss)(params)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss

  for _ in range(3):
    params, state, loss = step(params, state)
    values.append(float(loss))
  values.append(float(case.loss(params)))
  np.testing.assert_allclose(values, case.r["opt/losses"], atol=1e-3)
  case.r.compare_values(params, "opt/after3/", 1e-4)
