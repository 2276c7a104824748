"""The grounding task: loss, learning, search, meshes and edge cases."""

import jax
import numpy as np
import pytest

from mplug_jax.data.text import wordpiece
from mplug_jax.tasks import grounding
from mplug_jax.training.build import build_for_evaluation
from tests.support import grounding_task_case, tiny_run


@pytest.fixture(scope="module")
def tokenizer():
  return grounding_task_case.tokenizer()


@pytest.fixture(scope="module")
def case():
  return grounding_task_case.case()


@pytest.fixture(scope="module")
def reference(case):
  """Results on eight devices; the formula says what the loss must be."""
  return case.results()


def test_batch_spec_matches_the_transform(case):
  spec = case.task.batch_spec(8)
  assert {k: (v.shape, v.dtype) for k, v in case.batch.items()} == {
    k: (v.shape, v.dtype) for k, v in spec.items()
  }


# ---- location tokens


def test_location_tokens_of_fitted_and_bert_tokenizers(tokenizer):
  begin, ids = grounding.location_ids(tokenizer, 96)
  assert tokenizer.token_id("<box>") == begin
  assert [tokenizer.token_id(f"<bin{i}>") for i in (0, 50, 96)] == ids[[0, 50, 96]].tolist()
  words = [
    "[PAD]",
    *(f"[unused{i}]" for i in range(99)),
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *(f"[unused{i}]" for i in range(99, 994)),
  ]
  begin, ids = grounding.location_ids(wordpiece.WordPieceTokenizer("\n".join(words).encode()), 336)
  assert begin == 344
  assert len(ids) == 337
  assert (ids[0], ids[-1]) == (345, 681)


def test_tokenizer_without_location_tokens_raises(tokenizer):
  with pytest.raises(
    ValueError,
    match="no location tokens for config.task.bins=97: fit one with "
    "config.tokenizer.locations=98, or use",
  ):
    grounding.location_ids(tokenizer, 97)


@pytest.mark.parametrize(
  ("name", "value", "known"),
  [
    ("box_weights", "all", "per_example, batch, none"),
    ("eval_normalization", "mean", "clip, imagenet"),
  ],
)
def test_unknown_options_raise(case, name, value, known):
  with pytest.raises(ValueError, match=f"config.task.{name}='{value}' is not one of {known}"):
    build_for_evaluation(
      grounding_task_case.config(**{f"task__{name}": value}), case.tokenizer, jax.devices()[:1]
    )


# ---- the loss

box_losses = jax.jit(grounding.box_losses, static_argnums=4)


def by_hand(logits, batch, bins, how):
  """(sum of box losses, valid boxes) in float64.

  Logits of locations f32[R, 4, bins + 1]: 10,000 less leaves nothing of the others.
  """
  truth, valid = batch["box"].reshape(-1, 4).astype(np.float64), batch["valid"].ravel()
  loss, target = token_losses(logits, batch, bins)
  predicted = logits.argmax(-1) / bins
  error = np.minimum(np.abs(predicted - truth), 5)
  overlap = []
  for (x, y, w, h), (u, v, s, t) in zip(predicted, truth):
    shared = max(0, min(x + w / 2, u + s / 2) - max(x - w / 2, u - s / 2)) * max(
      0, min(y + h / 2, v + t / 2) - max(y - h / 2, v - t / 2)
    )
    hull = (max(x + w / 2, u + s / 2) - min(x - w / 2, u - s / 2)) * (
      max(y + h / 2, v + t / 2) - min(y - h / 2, v - t / 2)
    )
    union = w * h + s * t - shared
    overlap.append(shared / (union + 1e-5) - (hull - union) / (hull + 1e-5))
  weight = error * (1 - np.array(overlap))[:, None]
  if how == "batch":
    weight = weight[valid].mean(0)
  return (loss * (1 if how == "none" else weight)).mean(-1)[valid].sum(), valid.sum()


def token_losses(logits, batch, bins):
  """-> (f64[R, 4] cross-entropy, i64[R, 4] targets)."""
  target = np.floor(np.clip(batch["box"].reshape(-1, 4), 0, 1) * np.float32(bins)).astype(int)
  logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
  return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, target[..., None], -1)[
    ..., 0
  ], target


def test_loss_equals_the_formula(case, reference):
  """Of the task with its own weights; of the others from the same token losses."""
  numbers = np.floor(case.batch["box"].reshape(-1, 4) * np.float32(96)).astype(int)
  logits = case.decoded(case.batch, numbers)
  expected, count = by_hand(logits, case.batch, 96, "per_example")
  np.testing.assert_allclose(reference[2]["loss_box"], (expected, count), rtol=1e-5)
  assert count == 14 == reference[2]["iou"][1]
  loss, target = token_losses(logits, case.batch, 96)
  np.testing.assert_allclose(
    reference[2]["token_accuracy"][0],
    (logits.argmax(-1) == target).mean(-1)[case.batch["valid"].ravel()].sum(),
    rtol=1e-6,
  )
  for how in ("batch", "none"):
    losses = box_losses(
      loss.astype(np.float32),
      (logits.argmax(-1) / np.float32(96)).astype(np.float32),
      case.batch["box"].reshape(-1, 4),
      case.batch["valid"].ravel(),
      how,
    )
    assert float(losses.sum()) == pytest.approx(by_hand(logits, case.batch, 96, how)[0], rel=1e-5)


def test_correct_box_has_no_weight_and_each_mode_its_mean():
  truth = np.float32([[0.5, 0.5, 0.25, 0.25], [0.25, 0.25, 0.125, 0.5], [0, 0, 0, 0]])
  predicted = truth.copy()
  predicted[1] = 0.75, 0.25, 0.125, 0.5
  valid = np.array([True, True, False])
  loss = np.float32([[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]])
  # 1 - generalized IoU of the second box: it shares nothing with the true one, and 0.1875 of their
  # hull of 0.3125 is in neither.
  far = 1 + 0.1875 / (0.3125 + 1e-5)
  np.testing.assert_allclose(box_losses(loss, predicted, truth, valid, "none"), [2.5, 6.5, 0])
  np.testing.assert_allclose(
    box_losses(loss, predicted, truth, valid, "per_example"),
    [0, 5 * 0.5 * far / 4, 0],
    rtol=1e-5,
    atol=1e-6,
  )
  np.testing.assert_allclose(
    box_losses(loss, predicted, truth, valid, "batch"), [far / 16, 5 * far / 16, 0], rtol=1e-5
  )


# ---- devices


def test_loss_and_gradients_do_not_depend_on_devices_or_microbatches(case, reference):
  gradients, loss, metrics = reference
  # A key bias adds the same number to every score of a query; with one token a query has no choice.
  assert not [
    name
    for name, g in gradients.items()
    if np.abs(g).max() < 1e-6 and not name.endswith("key/bias")
  ]
  others, other_loss, other_metrics = case.results((2, 1, 1), parts=4)
  assert other_loss == pytest.approx(loss, rel=1e-5)
  tiny_run.assert_gradients_equal(others, gradients)
  for name in ("loss_box", "token_accuracy", "iou"):
    np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-5, err_msg=name)


def test_invalid_rows_do_not_change_the_loss(case, reference):
  """The contents of an invalid row change nothing, whatever the other rows are."""
  batch = {k: v.copy() for k, v in case.batch.items()}
  batch["box"][0, 1], batch["phrase"][0, 1] = 0.9, case.tokenizer.pad_id
  gradients, loss, _ = case.results(batch=batch)
  assert loss == pytest.approx(reference[1], rel=1e-6)
  tiny_run.assert_gradients_equal(gradients, reference[0])
