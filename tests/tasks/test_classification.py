"""Classification: the loss by hand, on every mesh and in microbatches.

That it learns; how a text meets two images; odd input.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax import data
from mplug_jax.checkpoints import manager as checkpoint
from mplug_jax.checkpoints import warm_start
from mplug_jax.models.bert import TextEncoder
from mplug_jax.training import loop
from tests.support import classification_run, mesh_case, random_state, tiny_run


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return classification_run.tokenizer(
    tmp_path_factory.mktemp("tokenizer"), classification_run.config("nlvr2")
  )


def no_dropout(**changes):
  return {
    "model__dropout_rate": 0.0,
    "model__attention_dropout_rate": 0.0,
    "model__vision_attention_dropout_rate": 0.0,
    **changes,
  }


class Case(mesh_case.MeshCase):
  """The tiny task of two images and its gradients on any mesh, in any number of parts.

  Some rows do not count.
  """

  def __init__(self, tokenizer, pairing):
    # A wide initialisation, so that every attention and every gradient matters; at 0.02 the
    # softmaxes are uniform.
    self.config = classification_run.config(
      "nlvr2",
      f"tiny,pairing={pairing}",
      **no_dropout(
        model__initializer_range=0.1, task__distill__alpha=0.4, ema__decay=0.9, ema__use="teacher"
      ),
    )
    self.tokenizer = tokenizer
    source = data.get_source(self.config, "train")
    batch = classification_run.stack(self.config, tokenizer, [source[5 * i] for i in range(8)])
    self.batch = {name: np.array(x) for name, x in batch.items()}
    # Two sentences about every pair of images: the second is the first of another.
    self.batch |= {
      name: np.stack([self.batch[name][:, 0], np.roll(self.batch[name][:, 0], 3, axis=0)], axis=1)
      for name in ("sentence", "label")
    }
    self.batch["corrupt"][2], self.batch["label"][5, 0] = True, -1
    self.built = loop.build(self.config, tokenizer, 10, 10, jax.devices()[:1])
    state = random_state.host_state(self.built, self.config.model.initializer_range)
    teacher = jax.tree.map(lambda x: 1.2 * x, state.params)
    self.state = state.replace(ema_params=teacher)


@pytest.fixture(scope="module", params=["shared", "duplicated"])
def case(request, tokenizer):
  return Case(tokenizer, request.param)


@pytest.fixture(scope="module")
def reference(case):
  return case.gradients()


@pytest.mark.parametrize(
  ("file", "arg", "sentences"),
  [("snli_ve", "tiny", 3), ("nlvr2", "tiny", 2), ("nlvr2", "tiny,data=scene_captions", 1)],
)
def test_batch_spec_matches_the_transform(tokenizer, file, arg, sentences):
  c = classification_run.config(file, arg, data__sentences_per_row=sentences)
  example = data.make_transform(c, tokenizer, train=True)(
    0, data.get_source(c, "train")[0], np.random.default_rng(0)
  ) | {"mask": np.True_}
  spec = loop.build(c, tokenizer, 10, 10, jax.devices()[:1]).task.batch_spec(1)
  assert {name: ((1,) + x.shape, x.dtype) for name, x in example.items()} == {
    name: (x.shape, x.dtype) for name, x in spec.items()
  }


def test_loss_is_the_mean_over_valid_sentences(case, reference):
  task = case.built.task
  logits, teacher = (
    np.asarray(task.apply(params, task.forward, case.batch), np.float64)
    for params in (case.state.params, case.state.ema_params)
  )
  assert np.abs(logits - teacher).max() > 1e-3
  total, right = 0.0, 0
  for row, sentence in itertools.product(range(8), range(2)):
    place = row, sentence
    if row == 2 or place == (5, 0):  # corrupt, without a label
      continue
    log = logits[place] - np.log(np.exp(logits[place]).sum())
    soft = np.exp(teacher[place]) / np.exp(teacher[place]).sum()
    total += 0.6 * -log[case.batch["label"][place]] + 0.4 * -(soft * log).sum()
    right += log.argmax() == case.batch["label"][place]
  _, loss, metrics = reference
  assert loss == pytest.approx(total / 13, rel=1e-5)
  assert metrics["loss_class"][1] == 13
  assert metrics["accuracy"] == (right, 13)
  assert metrics["corrupt_rows"][0] == 1


def test_eight_devices_and_two_microbatches_equal_one(case, reference):
  gradients, loss, metrics = case.gradients((2, 2, 2), parts=2)
  assert loss == pytest.approx(float(reference[1]), rel=1e-5)
  tiny_run.assert_gradients_equal(tiny_run.flat(gradients), tiny_run.flat(reference[0]))
  for name in ("loss_class", "accuracy"):
    np.testing.assert_allclose(metrics[name], reference[2][name], rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_four_microbatches_equal_one(case, reference):
  gradients, loss, _ = case.gradients(parts=4)
  assert loss == pytest.approx(float(reference[1]), rel=1e-5)
  tiny_run.assert_gradients_equal(tiny_run.flat(gradients), tiny_run.flat(reference[0]))


def test_invalid_rows_have_no_gradient(case, reference):
  changed = {name: x.copy() for name, x in case.batch.items()}
  changed["image"][2], changed["sentence"][2], changed["sentence"][5, 0] = (
    255,
    case.tokenizer.bos_id,
    case.tokenizer.bos_id,
  )
  gradients, loss, _ = case.gradients(batch=changed)
  assert loss == reference[1]
  for name, x in tiny_run.flat(gradients).items():
    np.testing.assert_array_equal(x, tiny_run.flat(reference[0])[name], err_msg=name)
  changed["corrupt"][:] = True
  gradients, loss, _ = case.gradients(batch=changed)
  assert loss == 0
  assert all((x == 0).all() for x in jax.tree.leaves(gradients))


def test_degenerate_sentences_and_images_give_finite_results(case):
  black = np.zeros((48, 48, 3), np.uint8)
  texts = ["", " ".join(["circle"] * 90), "\N{SNOWMAN}"] + ["a red circle"] * 5
  records = [
    {"images": [black, black], "id": 0, "sentence": text, "label": "True"} for text in texts
  ]
  batch = {
    name: np.array(x)
    for name, x in classification_run.stack(case.config, case.tokenizer, records).items()
  }
  assert (batch["sentence"][0, 0] != case.tokenizer.pad_id).sum() == 1
  assert (batch["sentence"][1, 0] != case.tokenizer.pad_id).all()
  batch |= {name: np.repeat(batch[name], 2, axis=1) for name in ("sentence", "label")}
  gradients, loss, _ = case.gradients(batch=batch)
  assert np.isfinite(loss)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_overfits_eight_pairs(tokenizer):
  """Each of four statements is true of one pair of images and false of another."""
  c = classification_run.config(
    "nlvr2",
    "tiny",
    **no_dropout(
      optim__name="adamw",
      optim__schedule__name="constant",
      optim__lr=3e-3,
      optim__weight_decay=0.0,
      model__initializer_range=0.05,
    ),
  )
  source = data.get_source(c, "train")
  records = [source[i] for i in range(0, 80, 10)]
  records = [
    record | {"sentence": records[i % 4]["sentence"], "label": str(i < 4)}
    for i, record in enumerate(records)
  ]
  batch = classification_run.stack(c, tokenizer, records)
  built = loop.build(c, tokenizer, 1000, 1000, jax.devices()[:1])
  state = random_state.overfit(built, batch, c.model.initializer_range, 600)
  probability = built.predict["classify"](state.params, batch)["probability"]
  np.testing.assert_array_equal(probability.argmax(-1), batch["label"][:, 0])
  np.testing.assert_allclose(probability.sum(-1), 1.0, rtol=1e-5)
  alone = built.predict["classify"](state.params, {name: x[:1] for name, x in batch.items()})[
    "probability"
  ]
  np.testing.assert_allclose(alone[0], probability[0], rtol=1e-4, atol=1e-6)


# ---- a text and its images


def test_each_sentence_is_encoded_once(case):
  rows = []

  def count(call, args, kwargs, context):
    if isinstance(context.module, TextEncoder) and context.method_name == "__call__":
      rows.append(args[0].shape[0])
    return call(*args, **kwargs)

  with nn.intercept_methods(count):
    jax.eval_shape(
      lambda params: case.built.task.apply(params, case.built.task.forward, case.batch),
      case.state.params,
    )
  assert rows == [16]


def features(task, params, batch):
  def run(module, b):
    ids = b["sentence"].reshape(16, -1)
    mask = ids != task.tokenizer.pad_id
    image = module.encode_image(
      b["image"].astype(jnp.float32).reshape((-1,) + b["image"].shape[2:]) / 255
    )
    return module.fuse_images(module.encode_text(ids, mask), mask, image, 2)

  return np.asarray(task.apply(params, run, batch))


def test_shared_layers_are_symmetric_and_duplicated_ones_are_not(case):
  task, params, width = case.built.task, case.state.params, case.config.model.hidden_size
  plain = features(task, params, case.batch)
  swapped = features(task, params, case.batch | {"image": case.batch["image"][:, ::-1]})
  if case.config.model.pairing == "shared":
    assert plain.shape == (16, 2 * width)
    np.testing.assert_allclose(
      swapped, np.concatenate([plain[:, width:], plain[:, :width]], axis=1), rtol=1e-4, atol=1e-5
    )
  else:
    assert plain.shape == (16, width)
  assert np.abs(swapped - plain).max() > 1e-2
  # Sentences about the same images do not see each other.
  turned = features(task, params, case.batch | {"sentence": case.batch["sentence"][:, ::-1]})
  np.testing.assert_allclose(
    turned.reshape(8, 2, -1)[:, ::-1], plain.reshape(8, 2, -1), rtol=1e-4, atol=1e-5
  )


@pytest.fixture(scope="module")
def single_run(tokenizer, tmp_path_factory):
  """Folder, random parameters and averages of a run with one layer for both images."""
  folder, rng = tmp_path_factory.mktemp("single"), np.random.default_rng(0)
  abstract = loop.build(
    classification_run.config("nlvr2"), tokenizer, 10, 10, jax.devices()[:1]
  ).abstract
  params, averages = (
    jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), abstract.params)
    for _ in range(2)
  )
  manager = checkpoint.Manager(folder)
  manager.save(
    3, jax.tree.map(jnp.asarray, {"params": params, "ema_params": averages}), {"step": 3}
  )
  manager.close()
  return folder, tiny_run.flat(params), tiny_run.flat(averages)


def test_second_layers_share_keys_and_values_and_start_as_copies(tokenizer, single_run):
  """From a run with one layer for both images.

  What it has not, or in another shape, is random where that is allowed, and only there.
  """
  folder, params, averages = single_run
  c = classification_run.config("nlvr2", f"tiny,data=scene_captions,init={folder}", ema__decay=0.9)
  state = random_state.state(loop.build(c, tokenizer, 10, 10, jax.devices()[:1]))
  new, report = warm_start.init_from(state, c.init)
  ours, our_averages = tiny_run.flat(new.params), tiny_run.flat(new.ema_params)
  second = {name for name in ours if "/second_" in name}
  assert not [
    name for name in second if "crossattention/key" in name or "crossattention/value" in name
  ]
  assert {
    "fusion_encoder/second_0/crossattention/query/kernel",
    "fusion_encoder/second_1/output/bias",
  } <= second
  # Another number of inputs and of classes.
  random = {name for name, where in report.items() if where == "new"}
  assert random == {"cls_head/dense/kernel", "cls_head/out/kernel", "cls_head/out/bias"}
  for name in ours.keys() - random:
    original = name.replace("/second_", "/layer_")
    np.testing.assert_array_equal(ours[name], params[original], err_msg=name)
    np.testing.assert_array_equal(our_averages[name], averages[original], err_msg=name)
  c = c.copy_and_resolve_references().unlock()
  c.init.new = ()
  with pytest.raises(ValueError, match="cls_head/.* has shape .* in the model"):
    warm_start.init_from(state, c.init)
  c.init.update({"new": ("cls_head/.*",), "copies": ()})
  with pytest.raises(
    ValueError, match=r"parameters are in none of the checkpoints \(fusion_encoder/second"
  ):
    warm_start.init_from(state, c.init)


@pytest.mark.parametrize(
  ("file", "changes", "message"),
  [
    (
      "nlvr2",
      {"model__classes": 3},
      "config.model.classes=3, but config.data.labels has 2 classes",
    ),
    (
      "nlvr2",
      {"model__pairing": "double"},
      "config.model.pairing='double' is not one of shared, duplicated",
    ),
    (
      "snli_ve",
      {"model__pairing": "duplicated"},
      "a layer for each of two images, but config.data.images_per_text=1",
    ),
    ("nlvr2", {"task__distill__alpha": 0.4}, "config.task.distill.alpha needs a teacher"),
    (
      "nlvr2",
      {"data__max_text": 65},
      "Texts of 65 tokens do not fit config.model.max_positions=64",
    ),
  ],
)
def test_invalid_config_values_raise(tokenizer, file, changes, message):
  with pytest.raises(ValueError, match=message):
    loop.build(classification_run.config(file, **changes), tokenizer)
