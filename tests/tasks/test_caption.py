"""Captioning: the loss by hand, on every mesh and in microbatches.

That it learns; what odd captions and images do to it.
"""

import jax
import numpy as np
import pytest

from mplug_jax import data
from mplug_jax.models.factory import build_model
from mplug_jax.parallel import batches
from mplug_jax.parallel import mesh as mesh_lib
from mplug_jax.tasks import base
from mplug_jax.tasks import caption as caption_task
from mplug_jax.training import loop
from tests.support import caption_run, mesh_case, random_state, tiny_run

MESHES = ((8, 1, 1), (2, 2, 2))
CAPTIONS = 2
FIT = mesh_case.FIT | {"optim__lr": 4e-3}
SETTINGS = {
  "model__initializer_range": 0.1,
  "data__captions_per_image": CAPTIONS,
  "task__beams": 2,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return caption_run.tokenizer(tmp_path_factory.mktemp("tokenizer"), caption_run.config())


class Case(mesh_case.MeshCase):
  """The tiny task without dropout, on rows with different weights, for any mesh."""

  def __init__(self, tokenizer):
    # A wide initialisation, so that every attention and every gradient matters; at 0.02 the
    # softmaxes are uniform.
    self.config, self.tokenizer = caption_run.config(**SETTINGS, **FIT), tokenizer
    self.batch = caption_run.batch(self.config, tokenizer)
    for row in range(8):  # as Chunked leaves rows that are not full; a corrupt image has none
      self.batch["caption_valid"][row, row % CAPTIONS + 1 :] = False
    self.batch["corrupt"][3], self.batch["caption_valid"][3] = True, False
    self.batch["caption"][~self.batch["caption_valid"]] = tokenizer.pad_id
    self.built = loop.build(self.config, tokenizer, 10, 10, jax.devices()[:1])
    self.state = random_state.host_state(self.built, self.config.model.initializer_range)


@pytest.fixture(scope="module")
def case(tokenizer):
  return Case(tokenizer)


@pytest.fixture(scope="module")
def reference(case):
  return case.gradients()


@pytest.fixture(scope="module")
def together(case):
  """Tokens of the images of the batch, encoded together."""
  task = case.built.task
  encode = jax.jit(lambda params, image: task.apply(params, base.encode_image, image))
  return jax.device_get(encode(case.state.params, case.batch["image"]))


@pytest.mark.parametrize(("devices", "rows"), [(1, 8), (4, 8), (8, 8), (1, 1)])
def test_images_encoded_one_by_one_equal_those_encoded_together(
  devices, rows, case, together, monkeypatch
):
  task, image = case.built.task, case.batch["image"][:rows]
  assert not np.array_equal(image[0], image[-1]) or rows == 1
  monkeypatch.setattr(base, "_OUT_OF_CACHE", 0)
  mesh = mesh_lib.make_mesh({"data": devices, "fsdp": 1, "tensor": 1}, jax.devices()[:devices])
  with jax.set_mesh(mesh):
    batch = batches.put_batch({"image": image}, mesh)
    traced = jax.jit(lambda params, batch: task.with_tokens(params, batch)).trace(
      case.state.params, batch
    )
    tokens = traced.lower().compile()(case.state.params, batch)["image"]
  assert ("('cpu',)" in str(traced.jaxpr)) == (rows > 1)
  np.testing.assert_allclose(tokens, together[:rows], atol=1e-5)


def test_tiny_images_are_encoded_together(case):
  """They stay in the cache."""
  traced = jax.make_jaxpr(lambda params, batch: case.built.task.with_tokens(params, batch))(
    case.state.params, {"image": case.batch["image"]}
  )
  assert "('cpu',)" not in str(traced)


def test_batch_spec_matches_the_transform(case):
  spec = case.built.task.batch_spec(8)
  assert {name: (x.shape, x.dtype) for name, x in case.batch.items()} == {
    name: (x.shape, x.dtype) for name, x in spec.items()
  }


def test_loss_is_the_mean_over_all_tokens_of_the_batch(case, reference):
  ids = case.batch["caption"].reshape(8 * CAPTIONS, -1)
  logits = case.forward(case.state.params).astype(np.float64)
  total, count, right = 0.0, 0, 0
  for row in range(8 * CAPTIONS):
    for t in range(1, ids.shape[1]):
      if ids[row, t] != case.tokenizer.pad_id:
        scores = logits[row, t - 1]
        total += np.log(np.exp(scores).sum()) - scores[ids[row, t]]
        right += scores.argmax() == ids[row, t]
        count += 1
  _, loss, metrics = reference
  assert loss == pytest.approx(total / count, rel=1e-5)
  assert metrics["loss_caption"] == (pytest.approx(total, rel=1e-5), count)
  assert metrics["token_accuracy"] == (right, count)
  assert metrics["corrupt_images"][0] == 1


@pytest.mark.parametrize(
  ("shape", "parts"), [pytest.param(MESHES[0], 1, marks=pytest.mark.slow), (MESHES[1], 2)]
)
def test_loss_and_gradients_equal_those_of_one_device(case, reference, shape, parts):
  """On meshes, one of them in two microbatches."""
  gradients, loss, metrics = case.gradients(shape, parts)
  assert loss == pytest.approx(float(reference[1]), rel=1e-5)
  tiny_run.assert_gradients_equal(tiny_run.flat(gradients), tiny_run.flat(reference[0]))
  for name in ("loss_caption", "token_accuracy"):
    np.testing.assert_allclose(metrics[name], reference[2][name], rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_four_microbatches_equal_one(case, reference):
  gradients, loss, _ = case.gradients(parts=4)
  assert loss == pytest.approx(float(reference[1]), rel=1e-5)
  tiny_run.assert_gradients_equal(tiny_run.flat(gradients), tiny_run.flat(reference[0]))


def test_corrupt_row_has_no_gradient(case, reference):
  changed = {name: x.copy() for name, x in case.batch.items()}
  changed["image"][3] = 255
  gradients, loss, _ = case.gradients(batch=changed)
  assert loss == reference[1]
  for name, x in tiny_run.flat(gradients).items():
    np.testing.assert_array_equal(x, tiny_run.flat(reference[0])[name], err_msg=name)


def test_prompt_tokens_are_no_targets():
  mask = np.array([[True] * 5 + [False], [True] * 3 + [False] * 3])
  np.testing.assert_array_equal(caption_task.targets(mask, 1), mask[:, 1:])
  np.testing.assert_array_equal(
    caption_task.targets(mask, 3), [[False, False, True, True, False], [False] * 5]
  )


@pytest.mark.parametrize("mode", ["standard", "official"])
def test_caption_after_a_prompt_is_learned_and_generated(case, mode):
  c = caption_run.config(
    **SETTINGS, task__prompt="the picture shows", task__prompt_mode=mode, task__max_length=4
  )
  task = caption_task.CaptionTask(build_model(c, case.tokenizer), c, case.tokenizer)
  prompt, batch = task.prompt, caption_run.batch(c, case.tokenizer)
  weight = jax.jit(task.loss_normalizers)(batch, None)["caption"]
  tokens, captions = batch["caption"] != case.tokenizer.pad_id, batch["caption_valid"].sum()
  assert weight == tokens.sum() - captions * len(prompt.ids) > 0
  out = jax.device_get(jax.jit(task.predict_fns()["generate"])(case.state.params, batch))
  assert out["tokens"].shape == (8, len(prompt.start) + c.task.max_length)
  assert (out["tokens"][:, : len(prompt.start)] == prompt.start).all()
  assert (out["length"] > len(prompt.start)).all()


def _only(case, count, texts, image):
  record = {"image": image, "image_id": 0, "captions": texts}
  return caption_run.stack(case.config, case.tokenizer, [record] * count)


def test_degenerate_captions_and_images_give_finite_results(case, tokenizer):
  black = np.zeros((48, 48, 3), np.uint8)
  batch = _only(case, 8, ["a red circle"] * CAPTIONS, black)
  odd = _only(case, 8, ["", " ".join(["circle"] * 90), "\N{SNOWMAN}"], black)
  for name in batch:
    batch[name][4:] = odd[name][4:]
  assert (batch["caption"][4, 1] == tokenizer.eos_id).sum() == 1
  assert batch["caption"][4, 1, -1] == tokenizer.eos_id
  gradients, loss, _ = case.gradients(batch=batch)
  assert np.isfinite(loss)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
  batch["corrupt"][:], batch["caption_valid"][:], batch["caption"][:] = (
    True,
    False,
    tokenizer.pad_id,
  )
  gradients, loss, _ = case.gradients(batch=batch)
  assert loss == 0
  assert all((x == 0).all() for x in jax.tree.leaves(gradients))


def test_overfits_eight_images(case):
  """The loss reaches 0 and every image gets its caption, whatever the other images are."""
  source = data.get_source(case.config, "train")
  records = [source[3 * i] for i in range(8)]  # the first of an image of five captions
  records = [record | {"captions": record["captions"][:1]} for record in records]
  assert len({record["captions"][0] for record in records}) == 8
  batch = caption_run.stack(case.config, case.tokenizer, records)
  params = case.overfit(batch, 300, random_state.host_state(case.built, 0.15))
  generate, decode = case.built.predict["generate"], case.tokenizer.decode
  out = generate(params, batch)
  assert [decode(ids[:length]) for ids, length in zip(out["tokens"], out["length"])] == [
    record["captions"][0] for record in records
  ]
  alone = generate(params, {name: np.repeat(x[:1], 8, axis=0) for name, x in batch.items()})
  np.testing.assert_array_equal(alone["tokens"], np.repeat(out["tokens"][:1], 8, axis=0))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"task__beam_mode": "wide"}, "unknown beam search mode 'wide'"),
    ({"task__min_length": 50}, "min_length=50"),
    ({"task__max_length": 64}, "Texts of 65 tokens do not fit config.model.max_positions=64"),
    ({"data__max_caption": 65}, "Texts of 65 tokens do not fit config.model.max_positions=64"),
    (
      {"task__prompt_mode": "glued"},
      "config.task.prompt_mode='glued' is not one of standard, official",
    ),
    ({"data__max_caption": 2}, "config.data.max_caption=2 leaves no room for a caption"),
  ],
)
def test_invalid_config_values_raise(tokenizer, changes, message):
  with pytest.raises(ValueError, match=message):
    loop.build(caption_run.config(**changes), tokenizer)
