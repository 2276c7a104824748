"""The grounding task: loss, learning, search, meshes and edge cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax import data
from mplug_jax.data import boxes, pipeline
from mplug_jax.data.images import box_transforms
from mplug_jax.data.text import wordpiece
from mplug_jax.parallel import batches as batches_lib
from mplug_jax.tasks import base, grounding
from mplug_jax.training import gradients as gradients_lib
from mplug_jax.training import loop
from tests.support import random_state, tiny_run
from tests.support.grounding_files import config, painted
from tests.support.grounding_files import tokenizer as fitted


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return fitted(tmp_path_factory.mktemp("tokenizer"), config())


class Made:
  """The tiny task with the official box weights, a state and a batch with invalid rows."""

  def __init__(self, tokenizer):
    self.config = config(
      model__initializer_range=0.1,
      task__box_weights="per_example",
      task__rounding="down",
      data__expressions_per_image=2,
      optim__schedule__name="constant",
    )
    self.tokenizer = tokenizer
    batches = pipeline.train_batches(
      data.get_source(self.config, "train"),
      data.make_transform(self.config, tokenizer, train=True),
      batch_size=8,
      seed=0,
      threads=0,
    )
    self.batch = {k: np.array(v) for k, v in next(batches).items()}
    batches.close()
    self.batch["valid"][0, 1] = self.batch["valid"][5, 0] = False
    self.built = self.build()
    self.state = random_state.host_state(self.built, self.config.model.initializer_range)
    self.task = self.built.task
    self.locate = self.built.predict["locate"]
    self.locations = np.array([tokenizer.token_id(f"<bin{i}>") for i in range(97)])
    self._compiled = {}

  def build(self, devices=1, **changes):
    c = self.config.copy_and_resolve_references()
    c.update_from_flattened_dict(
      {"mesh.data": devices, **{k.replace("__", "."): v for k, v in changes.items()}}
    )
    return loop.build(c, self.tokenizer, 10, 10, jax.devices()[:devices])

  def gradients(self, built, microbatches=1, batch=None):
    """-> ({path: gradient}, loss, {metric: (sum, count)})."""
    function = self._compiled.setdefault(
      (id(built), microbatches), jax.jit(gradients_lib.make_gradients(built.task, microbatches))
    )
    state = jax.tree.map(
      lambda x, a: jax.device_put(jnp.asarray(x), a.sharding),
      self.state.replace(rng=jax.random.key(3)),
      built.abstract,
    )
    with jax.set_mesh(built.mesh):
      out = function(state, batches_lib.put_batch(batch or self.batch, built.mesh))
    return tiny_run.flat(out[0]), float(out[1]), jax.device_get(out[2])

  @functools.cached_property
  def decoded(self):
    """Returns the decoder's logits f32[R, 4, 97] of the locations, for bins i32[R, 4]."""
    begin = self.tokenizer.token_id("<box>")

    def forward(module, batch, inputs):
      return module.decode(inputs, jnp.ones(inputs.shape, bool), self.task.encode(module, batch))

    function = jax.jit(
      lambda params, batch, inputs: self.task.apply(params, forward, batch, inputs)[
        :, :4, self.locations
      ]
    )

    def call(batch, numbers):
      inputs = np.concatenate([np.full((len(numbers), 1), begin), self.locations[numbers]], axis=1)
      return np.asarray(function(self.state.params, batch, inputs))

    return call


@pytest.fixture(scope="module")
def made(tokenizer):
  return Made(tokenizer)


@pytest.fixture(scope="module")
def one_device(made):
  return made.gradients(made.built)


def test_batch_spec_matches_the_transform(made):
  spec = made.task.batch_spec(8)
  assert {k: (v.shape, v.dtype) for k, v in made.batch.items()} == {
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
def test_unknown_options_raise(made, name, value, known):
  with pytest.raises(ValueError, match=f"config.task.{name}='{value}' is not one of {known}"):
    made.build(**{f"task__{name}": value})


# ---- the loss


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


def test_loss_equals_the_formula(made, one_device):
  """Of the task with its own weights; of the others from the same token losses."""
  numbers = np.floor(made.batch["box"].reshape(-1, 4) * np.float32(96)).astype(int)
  logits = made.decoded(made.batch, numbers)
  expected, count = by_hand(logits, made.batch, 96, "per_example")
  np.testing.assert_allclose(one_device[2]["loss_box"], (expected, count), rtol=1e-5)
  assert count == 14 == one_device[2]["iou"][1]
  loss, target = token_losses(logits, made.batch, 96)
  np.testing.assert_allclose(
    one_device[2]["token_accuracy"][0],
    (logits.argmax(-1) == target).mean(-1)[made.batch["valid"].ravel()].sum(),
    rtol=1e-6,
  )
  for how in ("batch", "none"):
    ours = grounding.box_losses(
      jnp.asarray(loss),
      boxes.dequantize(jnp.asarray(logits.argmax(-1)), 96),
      jnp.asarray(made.batch["box"].reshape(-1, 4)),
      jnp.asarray(made.batch["valid"].ravel()),
      how,
    )
    assert float(ours.sum()) == pytest.approx(by_hand(logits, made.batch, 96, how)[0], rel=1e-5)


def test_correct_box_has_no_weight_and_each_mode_its_mean():
  truth = jnp.array([[0.5, 0.5, 0.25, 0.25], [0.25, 0.25, 0.125, 0.5], [0.0, 0.0, 0.0, 0.0]])
  predicted = truth.at[1].set(jnp.array([0.75, 0.25, 0.125, 0.5]))
  valid = jnp.array([True, True, False])
  loss = jnp.array([[1.0, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]])
  far = 1 - float(boxes.generalized_iou(*(boxes.to_corners(x[1]) for x in (predicted, truth))))
  np.testing.assert_allclose(
    grounding.box_losses(loss, predicted, truth, valid, "none"), [2.5, 6.5, 0]
  )
  np.testing.assert_allclose(
    grounding.box_losses(loss, predicted, truth, valid, "per_example"),
    [0, 5 * 0.5 * far / 4, 0],
    rtol=1e-5,
    atol=1e-6,
  )
  np.testing.assert_allclose(
    grounding.box_losses(loss, predicted, truth, valid, "batch"),
    [far / 16, 5 * far / 16, 0],
    rtol=1e-5,
  )


# ---- devices


def test_loss_and_gradients_do_not_depend_on_devices_or_microbatches(made, one_device):
  gradients, loss, metrics = one_device
  # A key bias adds the same number to every score of a query; with one token a query has no choice.
  assert not [
    name
    for name, g in gradients.items()
    if np.abs(g).max() < 1e-6 and not name.endswith("key/bias")
  ]
  for devices, parts in ((8, 1), (2, 4)):
    others, other_loss, other_metrics = made.gradients(made.build(devices), parts)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    tiny_run.assert_gradients_equal(others, gradients)
    for name in ("loss_box", "token_accuracy", "iou"):
      np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-5, err_msg=name)


def test_invalid_rows_do_not_change_the_loss(made, one_device):
  """What stands in an invalid row changes nothing, whatever the other rows are."""
  batch = {k: v.copy() for k, v in made.batch.items()}
  batch["box"][0, 1], batch["phrase"][0, 1] = 0.9, made.tokenizer.pad_id
  gradients, loss, _ = made.gradients(made.built, batch=batch)
  assert loss == pytest.approx(one_device[1], rel=1e-6)
  tiny_run.assert_gradients_equal(gradients, one_device[0])


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
  state, healthy, steps = random_state.state(built, c.model.initializer_range), jnp.bool_(True), 0
  while steps < 600:
    for _ in range(20):
      state, metrics, health = built.train_step(state, batch, healthy)
    steps += 20
    if float(metrics["loss"][0]) < 0.01:
      break
  assert float(metrics["loss"][0]) < 0.01
  assert bool(health["ok"])
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
