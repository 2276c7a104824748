"""Captioning, video captioning, retrieval and grounding against recordings of the official code."""

from tests.support import parity


@parity.recordings("caption")
def test_caption(path):
  names = {row.name for row in parity.check(path, least=47).rows}
  assert {
    "out/loss",
    "out/scst_loss",
    "grad_norms/scst_loss/text_decoder",
    "beam/beam5_min8_max25/ids",
  } <= names


@parity.recordings("videocap")
def test_video_caption(path):
  names = {row.name for row in parity.check(path, least=31).rows}
  assert {
    "out/frame_embeds",
    "out/video_embeds",
    "grad_norms/loss/visual_encoder",
    "beam/beam10_min15_max25/scores",
  } <= names


@parity.recordings("retrieval")
def test_retrieval(path):
  names = {row.name for row in parity.check(path, least=118).rows}
  assert {
    "out/step1/neg_image_index",
    "out/step2/loss_ita",
    "grad/step3_ita_plus_itm/temp",
    "queue_after/step3/image_queue",
    "out/eval/score_t2i",
    "meta.eval.metrics",
  } <= names


@parity.recordings("grounding")
def test_grounding(path):
  names = {row.name for row in parity.check(path, least=25).rows}
  assert {
    "out/loss_seq",
    "out/weight_giou",
    "grad_norms/loss_seq/fusion_encoder",
    "out/pred_boxes",
  } <= names
