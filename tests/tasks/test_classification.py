"""Classification: the loss by hand, on every mesh and in microbatches.

That it learns; how a text meets two images; odd input.
"""

import functools
import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest

from mplug_jax import data, tasks
from mplug_jax.checkpoints import manager as checkpoint
from mplug_jax.checkpoints import warm_start
from mplug_jax.models.bert import TextEncoder
from mplug_jax.models.factory import build_model
from mplug_jax.training import loop
from tests.support import classification_run, mesh_case, random_state, tiny_run


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return classification_run.tokenizer(
    tmp_path_factory.mktemp("tokenizer"), classification_run.config("nlvr2")
  )


# With distillation, the loss reads the averages as a teacher.
DISTILLED = {"task__distill__alpha": 0.4, "ema__decay": 0.9, "ema__use": "teacher"}


class Case(mesh_case.MeshCase):
  """The tiny task of two images and its gradients on any mesh, in any number of parts.

  Some rows do not count. Duplicated layers learn from a teacher, shared ones do not.
  """

  def __init__(self, tokenizer, pairing):
    # A wide initialisation, so that every attention and every gradient matters; at 0.02 the
    # softmaxes are uniform.
    self.config = classification_run.config(
      "nlvr2",
      f"tiny,pairing={pairing}",
      model__initializer_range=0.1,
      **tiny_run.NO_DROPOUT,
      **(DISTILLED if pairing == "duplicated" else mesh_case.FIT),
    )
    self.tokenizer = tokenizer
    source = data.get_source(self.config, "train")
    self.batch = classification_run.stack(self.config, tokenizer, [source[5 * i] for i in range(8)])
    # Two sentences about every pair of images: the second is the first of another.
    self.batch |= {
      name: np.stack([self.batch[name][:, 0], np.roll(self.batch[name][:, 0], 3, axis=0)], axis=1)
      for name in ("sentence", "label")
    }
    self.batch["corrupt"][2], self.batch["label"][5, 0] = True, -1
    self.built = loop.build(self.config, tokenizer, 10, 10, jax.devices()[:1])
    self.state = random_state.host_state(self.built, self.config.model.initializer_range)
    if self.config.ema.decay:
      self.state = self.state.replace(ema_params=jax.tree.map(lambda x: 1.2 * x, self.state.params))
    self.encoded = []  # rows of the calls of the text encoder, traced once
    self._forward = jax.jit(self._logits_and_features)

  def _logits_and_features(self, params, batch):
    fused = []

    def record(call, args, kwargs, context):
      out = call(*args, **kwargs)
      if isinstance(context.module, TextEncoder) and context.method_name == "__call__":
        self.encoded.append(args[0].shape[0])
      if context.method_name == "fuse_images":
        fused.append(out)
      return out

    with nn.intercept_methods(record):
      logits = self.built.task.apply(params, self.built.task.forward, batch)
    return logits, *fused


@pytest.fixture(scope="module")
def cases(tokenizer):
  """Function pairing -> its case."""
  return functools.cache(functools.partial(Case, tokenizer))


@pytest.fixture(scope="module", params=["shared", "duplicated"])
def case(request, cases):
  return cases(request.param)


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
  task = tasks.get(c.task.name)(build_model(c, tokenizer), c, tokenizer)
  spec = task.batch_spec(1)
  assert {name: ((1,) + x.shape, x.dtype) for name, x in example.items()} == {
    name: (x.shape, x.dtype) for name, x in spec.items()
  }


def test_loss_is_the_mean_over_valid_sentences(case, reference):
  """With a teacher, 0.4 of the target is its distribution."""
  alpha = case.config.task.distill.alpha
  logits = case.forward(case.state.params)[0].astype(np.float64)
  teacher = case.forward(case.state.ema_params)[0].astype(np.float64) if alpha else logits
  assert (np.abs(logits - teacher).max() > 1e-3) == (alpha > 0)
  total, right = 0.0, 0
  for row, sentence in itertools.product(range(8), range(2)):
    place = row, sentence
    if row == 2 or place == (5, 0):  # corrupt, without a label
      continue
    log = logits[place] - np.log(np.exp(logits[place]).sum())
    soft = np.exp(teacher[place]) / np.exp(teacher[place]).sum()
    total += (1 - alpha) * -log[case.batch["label"][place]] + alpha * -(soft * log).sum()
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
  batch = classification_run.stack(case.config, case.tokenizer, records)
  assert (batch["sentence"][0, 0] != case.tokenizer.pad_id).sum() == 1
  assert (batch["sentence"][1, 0] != case.tokenizer.pad_id).all()
  batch |= {name: np.repeat(batch[name], 2, axis=1) for name in ("sentence", "label")}
  gradients, loss, _ = case.gradients(batch=batch)
  assert np.isfinite(loss)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_overfits_eight_pairs(cases):
  """Each of four statements is true of one pair of images and false of another."""
  case = cases("shared")
  source = data.get_source(case.config, "train")
  records = [source[i] for i in range(0, 80, 10)]
  records = [
    record | {"sentence": records[i % 4]["sentence"], "label": str(i < 4)}
    for i, record in enumerate(records)
  ]
  batch = classification_run.stack(case.config, case.tokenizer, records)
  second = {"sentence": batch["sentence"], "label": np.full_like(batch["label"], -1)}
  params = case.overfit(
    batch | {name: np.concatenate([batch[name], x], axis=1) for name, x in second.items()}, 150
  )
  classify = case.built.predict["classify"]
  probability = classify(params, batch)["probability"]
  np.testing.assert_array_equal(probability.argmax(-1), batch["label"][:, 0])
  np.testing.assert_allclose(probability.sum(-1), 1.0, rtol=1e-5)
  # Whatever the other rows are: the first one alone.
  alone = classify(params, {name: np.repeat(x[:1], 8, axis=0) for name, x in batch.items()})
  np.testing.assert_allclose(
    alone["probability"], np.repeat(probability[:1], 8, axis=0), rtol=1e-4, atol=1e-6
  )


# ---- a text and its images


def test_each_sentence_is_encoded_once(case):
  case.forward(case.state.params)
  assert case.encoded == [16]


def test_shared_layers_are_symmetric_and_duplicated_ones_are_not(case):
  width, batch, params = case.config.model.hidden_size, case.batch, case.state.params
  _, plain = case.forward(params)
  _, swapped = case.forward(params, image=batch["image"][:, ::-1])
  if case.config.model.pairing == "shared":
    assert plain.shape == (16, 2 * width)
    np.testing.assert_allclose(
      swapped, np.concatenate([plain[:, width:], plain[:, :width]], axis=1), rtol=1e-4, atol=1e-5
    )
  else:
    assert plain.shape == (16, width)
  assert np.abs(swapped - plain).max() > 1e-2
  # Sentences about the same images do not see each other.
  _, turned = case.forward(params, sentence=batch["sentence"][:, ::-1])
  np.testing.assert_allclose(
    turned.reshape(8, 2, -1)[:, ::-1], plain.reshape(8, 2, -1), rtol=1e-4, atol=1e-5
  )


@pytest.fixture(scope="module")
def single_run(cases, tmp_path_factory):
  """Folder, random parameters and averages of a run with one layer for both images."""
  folder, rng = tmp_path_factory.mktemp("single"), np.random.default_rng(0)
  abstract = cases("shared").built.abstract
  params, averages = (
    jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), abstract.params)
    for _ in range(2)
  )
  manager = checkpoint.Manager(folder)
  manager.save(3, jax.device_put({"params": params, "ema_params": averages}), {"step": 3})
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
