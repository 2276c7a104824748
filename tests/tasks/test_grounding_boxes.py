"""Grounding: images on their canvas and the boxes that are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax import data
from mplug_jax.data import boxes
from mplug_jax.data.images import box_transforms
from mplug_jax.parallel import batches
from mplug_jax.tasks import base, grounding
from mplug_jax.training import start
from tests.support import grounding_task_case, random_state
from tests.support.grounding_files import painted


@pytest.fixture(scope="module")
def case():
  return grounding_task_case.case()


# ---- images


def test_canvas_is_zero_around_the_normalized_image(case):
  canvas = box_transforms.fit(painted(20, 40, red=(2, 2, 10, 10)), np.zeros((0, 4)), 48)
  left, top, right, bottom = canvas.placed

  @jax.jit
  def normalized(image, placed, others, others_placed):
    images, frames = jnp.concatenate([image, others]), jnp.concatenate([placed, others_placed])
    return *(case.task._normalize(images, frames, x) for x in (False, True)), base.normalize(others)

  *results, whole = jax.device_get(
    normalized(
      canvas.image[None],
      np.array([canvas.placed], np.int32),
      case.batch["image"],
      case.batch["placed"],
    )
  )
  for out, mean, std in zip(
    results,
    ((0.48145466, 0.4578275, 0.40821073), (0.485, 0.456, 0.406)),
    ((0.26862954, 0.26130258, 0.27577711), (0.229, 0.224, 0.225)),
  ):
    out = out[0].copy()
    inside = (canvas.image[top:bottom, left:right] / 255 - mean) / std
    np.testing.assert_allclose(out[top:bottom, left:right], inside, atol=1e-5)
    out[top:bottom, left:right] = 0
    assert not out.any()
  np.testing.assert_array_equal(results[0][1:], whole)  # scenes fill the canvas


def test_only_the_search_uses_eval_normalization(case, monkeypatch):
  """With "clip", the tests of loss and score compare both with what CLIP's statistics give."""
  c = case.config.copy_and_resolve_references()
  c.task.eval_normalization = "imagenet"
  task, used = grounding.GroundingTask(case.task.model, c, case.tokenizer), []

  def recorded(image, placed, imagenet):
    used.append(imagenet)
    return base.normalize(image)

  monkeypatch.setattr(task, "_normalize", recorded)
  params, batch = case.state.params, case.batch
  jax.eval_shape(task.predict_fns()["locate"], params, batch)
  jax.eval_shape(
    lambda params, batch, key: task.loss(params, case.state, batch, key)[0],
    *(params, batch, jax.random.key(0)),
  )
  assert used == [True, False]


def test_boxes_map_back_to_original_pixels():
  image, truth = np.zeros((37, 90, 3), np.uint8), np.array([[3, 4, 50, 30], [0, 0, 90, 37.0]])
  canvas = box_transforms.fit(image, truth, 48)
  centered = np.concatenate([boxes.to_centered(canvas.boxes) / 48, [[0.5, 0.5, 3.0, 3.0]]])
  back = jax.jit(grounding.in_image_pixels, static_argnums=3)(
    centered[None].astype(np.float32),
    np.array([canvas.placed], np.int32),
    np.array([[90, 37]], np.int32),
    48,
  )
  np.testing.assert_allclose(back[0, :2], truth, atol=1e-4)
  # The last one is cut off at the canvas, whose bars are above and below.
  np.testing.assert_allclose(back[0, 2, ::2], [0, 90], atol=1e-4)


# ---- finding boxes


def test_overfits_eight_scenes():
  """The loss reaches 0, and the search gives every box exactly, with probability near 1."""
  c, tokenizer = grounding_task_case.config(), grounding_task_case.tokenizer()
  source, count = data.get_source(c, "train"), c.data.expressions_per_image
  records = [source[i] | {"expressions": source.expressions(i)[:count]} for i in range(8)]
  examples = [
    data.make_transform(c, tokenizer, train=False)(i, record, None) | {"mask": np.True_}
    for i, record in enumerate(records)
  ]
  built = grounding_task_case.build()
  batch = batches.put_batch(
    {k: np.stack([e[k] for e in examples]) for k in examples[0]}, built.mesh
  )
  step, _ = start.compile_step(built, 8)  # as runs compile it, which then read it from the cache
  state = random_state.overfit(built, batch, c.model.initializer_range, 600, step)
  out = built.predict["locate"](state.params, batch)
  np.testing.assert_array_equal(out["bins"], boxes.quantize(batch["box"], c.task.bins, "nearest"))
  np.testing.assert_allclose(out["box"], out["nearest"])
  assert (np.exp(out["score"]) > 0.9).all()
  truth = np.array([[e["box"] for e in record["expressions"]] for record in records])
  assert boxes.iou(out["box"].astype(np.float64), truth.astype(np.float64)).min() > 0.85


def test_score_is_the_log_probability_of_the_four_tokens(case):
  """Teacher forcing with the tokens of a search gives its tokens and score."""
  out = case.locate(case.state.params, case.batch)
  logits = case.decoded(case.batch, out["bins"].reshape(-1, 4)).reshape(8, 2, 4, 97)
  log_prob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  np.testing.assert_array_equal(log_prob.argmax(-1), out["bins"])
  np.testing.assert_allclose(log_prob.max(-1).sum(-1), out["score"], atol=1e-4)
  assert (
    len(np.unique(out["bins"].reshape(-1, 4), axis=0)) > 1
  )  # the search depends on what it reads


# ---- the edges


def test_degenerate_batches_give_finite_gradients_and_boxes(case):
  """Nothing readable at all; constant images with one empty phrase; the same phrase everywhere."""
  nothing = {k: np.zeros_like(v) for k, v in case.batch.items()} | {"corrupt": np.ones(8, bool)}
  nothing["phrase"] += case.tokenizer.pad_id
  constant = case.batch | {"image": np.full_like(case.batch["image"], 255)}
  constant["phrase"] = np.full_like(case.batch["phrase"], case.tokenizer.pad_id)
  constant["phrase"][..., 0], constant["phrase"][..., 1] = (
    case.tokenizer.bos_id,
    case.tokenizer.eos_id,
  )
  equal = case.batch | {
    "phrase": np.broadcast_to(case.batch["phrase"][:1, :1], case.batch["phrase"].shape),
    "box": np.ones_like(case.batch["box"]),
  }
  for batch in (nothing, constant, equal):
    gradients, loss, _ = case.results(batch=batch)
    assert np.isfinite(loss)
    assert all(np.isfinite(g).all() for g in gradients.values())
    out = case.locate(case.state.params, batch)
    assert all(np.isfinite(out[name]).all() for name in ("box", "score", "nearest"))
    if batch is nothing:
      assert loss == 0
      assert not any(g.any() for g in gradients.values())


def test_batch_of_one(case):
  batch = {k: jnp.asarray(v[:1]) for k, v in case.batch.items()}
  task = case.task
  one, out = jax.jit(
    lambda params, batch: (
      task.loss(params, case.state, batch, jax.random.key(0))[0]["box"],
      task.predict_fns()["locate"](params, batch),
    )
  )(case.state.params, batch)
  assert np.isfinite(float(one))
  assert out["box"].shape == (1, 2, 4)
  np.testing.assert_allclose(
    out["box"], case.locate(case.state.params, case.batch)["box"][:1], atol=1e-3
  )
