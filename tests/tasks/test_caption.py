"""Captioning: the loss by hand, on every mesh and in microbatches.

That it learns; what odd captions and images do to it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax import data
from mplug_jax.parallel import batches
from mplug_jax.parallel import mesh as mesh_lib
from mplug_jax.tasks import base
from mplug_jax.tasks import caption as caption_task
from mplug_jax.training import loop
from tests.support import caption_run, mesh_case, random_state, tiny_run

MESHES = ((8, 1, 1), (2, 2, 2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return caption_run.tokenizer(tmp_path_factory.mktemp("tokenizer"), caption_run.config())


class Case(mesh_case.MeshCase):
  """The tiny task without dropout, on rows with different weights, for any mesh."""

  def __init__(self, tokenizer):
    # A wide initialisation, so that every attention and every gradient matters; at 0.02 the
    # softmaxes are uniform.
    self.config, self.tokenizer = caption_run.config(model__initializer_range=0.1), tokenizer
    self.batch = caption_run.batch(self.config, tokenizer)
    for row in range(8):  # as Chunked leaves rows that are not full; a corrupt image has none
      self.batch["caption_valid"][row, row % 5 + 1 :] = False
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


@pytest.mark.parametrize(("devices", "rows"), [(1, 8), (4, 8), (8, 8), (1, 1)])
def test_images_encoded_one_by_one_equal_those_encoded_together(devices, rows, case, monkeypatch):
  task, image = case.built.task, case.batch["image"][:rows]
  assert not np.array_equal(image[0], image[-1]) or rows == 1
  together = task.apply(case.state.params, lambda module, x: base.encode_image(module, x), image)
  assert "platform_index" not in str(
    jax.make_jaxpr(task.with_tokens)(case.state.params, {"image": image})
  )  # tiny images stay in the cache
  monkeypatch.setattr(base, "_OUT_OF_CACHE", 0)
  mesh = mesh_lib.make_mesh({"data": devices, "fsdp": 1, "tensor": 1}, jax.devices()[:devices])
  with jax.set_mesh(mesh):
    traced = jax.make_jaxpr(task.with_tokens)(case.state.params, {"image": image})
    found = jax.jit(task.with_tokens)(case.state.params, batches.put_batch({"image": image}, mesh))[
      "image"
    ]
  assert ("platform_index" in str(traced)) == (rows > 1)
  np.testing.assert_allclose(found, together, atol=1e-5)


def test_batch_spec_matches_the_transform(case):
  spec = case.built.task.batch_spec(8)
  assert {name: (x.shape, x.dtype) for name, x in case.batch.items()} == {
    name: (x.shape, x.dtype) for name, x in spec.items()
  }


def test_loss_is_the_mean_over_all_tokens_of_the_batch(case, reference):
  task, ids = case.built.task, case.batch["caption"].reshape(40, -1)
  logits = np.asarray(task.apply(case.state.params, task.forward, case.batch), np.float64)
  total, count, right = 0.0, 0, 0
  for row in range(40):
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
def test_caption_after_a_prompt_is_learned_and_generated(tokenizer, mode):
  c = caption_run.config(
    task__prompt="the picture shows", task__prompt_mode=mode, task__max_length=4
  )
  built = loop.build(c, tokenizer, 10, 10, jax.devices()[:1])
  prompt, batch = built.task.prompt, caption_run.batch(c, tokenizer)
  weight = built.task.loss_normalizers({k: jnp.asarray(v) for k, v in batch.items()}, None)[
    "caption"
  ]
  assert weight == (batch["caption"] != tokenizer.pad_id).sum() - 40 * len(prompt.ids)
  out = built.predict["generate"](random_state.state(built).params, batch)
  assert out["tokens"].shape == (8, len(prompt.start) + c.task.max_length)
  assert (out["tokens"][:, : len(prompt.start)] == prompt.start).all()
  assert (out["length"] > len(prompt.start)).all()


def _only(case, count, texts, image):
  record = {"image": image, "image_id": 0, "captions": texts}
  return {
    k: np.array(v)
    for k, v in caption_run.stack(case.config, case.tokenizer, [record] * count).items()
  }


def test_degenerate_captions_and_images_give_finite_results(case, tokenizer):
  black = np.zeros((48, 48, 3), np.uint8)
  batch = _only(case, 8, ["a red circle"] * 5, black)
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


def test_overfits_eight_images(tokenizer):
  """The loss reaches 0 and every image gets its caption, in a batch of eight and of one."""
  c = caption_run.config(
    data__captions_per_image=1,
    optim__name="adamw",
    optim__schedule__name="constant",
    optim__lr=3e-3,
    optim__weight_decay=0.0,
    task__beams=2,
    model__initializer_range=0.05,
    eval__batch_size=8,
  )
  source = data.get_source(c, "train")
  records = [source[5 * i] for i in range(8)]
  batch = caption_run.stack(c, tokenizer, records)
  built = loop.build(c, tokenizer, 1000, 1000, jax.devices()[:1])
  state = random_state.overfit(built, batch, c.model.initializer_range, 400)
  assert len({record["captions"][0] for record in records}) == 8
  out = built.predict["generate"](state.params, batch)
  assert [tokenizer.decode(ids[:length]) for ids, length in zip(out["tokens"], out["length"])] == [
    r["captions"][0] for r in records
  ]
  alone = built.predict["generate"](state.params, {name: x[:1] for name, x in batch.items()})
  np.testing.assert_array_equal(alone["tokens"][0], out["tokens"][0])


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
