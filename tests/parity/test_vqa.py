"""VQA against recordings of the official code: gradients, distillation, beams, ranking, updates."""

from tests.support import parity


@parity.recordings("vqa")
def test_vqa(path):
  report = parity.check(path, least=75)
  names = {row.name for row in report.rows}
  assert {
    "out/loss",
    "out/m_logits",
    "out/loss_distill_as_released",
    "out/rank_topk_ids",
    "opt/losses",
  } <= names
  assert {
    "grad_norms/loss/text_decoder",
    "grad_norms/loss_distill_alpha0.4/visual_encoder",
  } <= names
  assert sum(name.startswith("beam/") for name in names) >= 3 * 7
  assert sum(name.startswith("momentum_after/") for name in names) >= 5
  assert sum(name.startswith("opt/after3/") for name in names) >= 6
