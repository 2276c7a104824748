"""Grounding: images on their canvas and the boxes that are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax import data
from mplug_jax.data import boxes
from mplug_jax.data.images import box_transforms
from mplug_jax.tasks import base, grounding
from mplug_jax.training import loop
from tests.support import random_state
from tests.support.grounding_files import config, painted
from tests.support.grounding_files import tokenizer as fitted
from tests.support.grounding_task_case import Made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return fitted(tmp_path_factory.mktemp("tokenizer"), config())


@pytest.fixture(scope="module")
def made(tokenizer):
  return Made(tokenizer)


# ---- images


def test_canvas_is_zero_around_the_normalized_image(made):
  image = painted(20, 40, red=(2, 2, 10, 10))
  canvas = box_transforms.fit(image, np.zeros((0, 4)), 48)
  left, top, right, bottom = canvas.placed
  for imagenet, mean, std in (
    (False, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    (True, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  ):
    out = np.array(
      made.task._normalize(jnp.asarray(canvas.image[None]), jnp.asarray([canvas.placed]), imagenet)
    )[0]
    inside = (canvas.image[top:bottom, left:right] / 255 - mean) / std
    np.testing.assert_allclose(out[top:bottom, left:right], inside, atol=1e-5)
    out[top:bottom, left:right] = 0
    assert not out.any()
  np.testing.assert_array_equal(
    made.task._normalize(made.batch["image"], jnp.asarray(made.batch["placed"]), False),
    base.normalize(jnp.asarray(made.batch["image"])),
  )  # scenes fill the canvas


@pytest.mark.parametrize("name", ["clip", "imagenet"])
def test_only_the_search_uses_eval_normalization(made, monkeypatch, name):
  c = made.config.copy_and_resolve_references()
  c.task.eval_normalization = name
  task, used = grounding.GroundingTask(made.task.model, c, made.tokenizer), []

  def recorded(image, placed, imagenet):
    used.append(imagenet)
    return base.normalize(image)

  monkeypatch.setattr(task, "_normalize", recorded)
  batch = {k: jnp.asarray(v) for k, v in made.batch.items()}
  jax.eval_shape(lambda params: task.predict_fns()["locate"](params, batch), made.state.params)
  jax.eval_shape(
    lambda params: task.loss(params, made.state, batch, jax.random.key(0))[0], made.state.params
  )
  assert used == [name == "imagenet", False]


def test_boxes_map_back_to_original_pixels(made):
  image, truth = np.zeros((37, 90, 3), np.uint8), np.array([[3, 4, 50, 30], [0, 0, 90, 37.0]])
  canvas = box_transforms.fit(image, truth, 48)
  back = grounding.in_image_pixels(
    jnp.asarray(boxes.to_centered(canvas.boxes) / 48)[None],
    jnp.asarray([canvas.placed]),
    jnp.asarray([[90, 37]]),
    48,
  )
  np.testing.assert_allclose(back[0], truth, atol=1e-4)
  whole = grounding.in_image_pixels(
    jnp.array([[[0.5, 0.5, 3.0, 3.0]]]), jnp.asarray([canvas.placed]), jnp.asarray([[90, 37]]), 48
  )
  np.testing.assert_allclose(
    whole[0, 0, ::2], [0, 90], atol=1e-4
  )  # cut off at the canvas, whose bars are above and below


# ---- finding boxes


def test_overfits_eight_scenes(tokenizer):
  """The loss reaches 0, and the search gives every box exactly, with probability near 1."""
  c = config(
    data__augment__flip=0.0,
    optim__name="adamw",
    optim__lr=3e-3,
    optim__schedule__name="constant",
    optim__weight_decay=0.0,
    optim__b2=0.99,
  )
  source = data.get_source(c, "train")
  examples = [
    data.make_transform(c, tokenizer, train=False)(i, source[i], None) | {"mask": np.True_}
    for i in range(8)
  ]
  batch = {k: jnp.asarray(np.stack([e[k] for e in examples])) for k in examples[0]}
  built = loop.build(c, tokenizer, 1000, 1000, jax.devices()[:1])
  state = random_state.overfit(built, batch, c.model.initializer_range, 600)
  out = built.predict["locate"](state.params, batch)
  np.testing.assert_array_equal(out["bins"], boxes.quantize(batch["box"], c.task.bins, "nearest"))
  np.testing.assert_allclose(out["box"], out["nearest"])
  assert (np.exp(out["score"]) > 0.9).all()
  truth = np.array([[e["box"] for e in source.expressions(i)] for i in range(8)])
  assert boxes.iou(out["box"].astype(np.float64), truth.astype(np.float64)).min() > 0.85


def test_score_is_the_log_probability_of_the_four_tokens(made, tokenizer):
  """Teacher forcing with the tokens of a search gives its tokens and score."""
  out = made.locate(made.state.params, made.batch)
  log_prob = np.asarray(
    jax.nn.log_softmax(made.decoded(made.batch, out["bins"].reshape(-1, 4)), -1)
  ).reshape(8, 2, 4, 97)
  np.testing.assert_array_equal(log_prob.argmax(-1), out["bins"])
  np.testing.assert_allclose(log_prob.max(-1).sum(-1), out["score"], atol=1e-4)
  assert (
    len(np.unique(out["bins"].reshape(-1, 4), axis=0)) > 1
  )  # the search depends on what it reads


# ---- the edges


def test_degenerate_batches_give_finite_gradients_and_boxes(made):
  """Nothing readable at all; constant images with one empty phrase; the same phrase everywhere."""
  nothing = {k: np.zeros_like(v) for k, v in made.batch.items()} | {"corrupt": np.ones(8, bool)}
  nothing["phrase"] += made.tokenizer.pad_id
  constant = made.batch | {"image": np.full_like(made.batch["image"], 255)}
  constant["phrase"] = np.full_like(made.batch["phrase"], made.tokenizer.pad_id)
  constant["phrase"][..., 0], constant["phrase"][..., 1] = (
    made.tokenizer.bos_id,
    made.tokenizer.eos_id,
  )
  equal = made.batch | {
    "phrase": np.broadcast_to(made.batch["phrase"][:1, :1], made.batch["phrase"].shape),
    "box": np.ones_like(made.batch["box"]),
  }
  for batch in (nothing, constant, equal):
    gradients, loss, _ = made.gradients(made.built, batch=batch)
    assert np.isfinite(loss)
    assert all(np.isfinite(g).all() for g in gradients.values())
    out = made.locate(made.state.params, batch)
    assert all(np.isfinite(out[name]).all() for name in ("box", "score", "nearest"))
    if batch is nothing:
      assert loss == 0
      assert not any(g.any() for g in gradients.values())


def test_batch_of_one(made):
  batch = {k: jnp.asarray(v[:1]) for k, v in made.batch.items()}
  task = made.task
  one, out = jax.jit(
    lambda params, batch: (
      task.loss(params, made.state, batch, jax.random.key(0))[0]["box"],
      task.predict_fns()["locate"](params, batch),
    )
  )(made.state.params, batch)
  assert np.isfinite(float(one))
  assert out["box"].shape == (1, 2, 4)
  np.testing.assert_allclose(
    out["box"], made.locate(made.state.params, made.batch)["box"][:1], atol=1e-3
  )
