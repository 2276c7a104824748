"""Pre-training: examples, losses against separate passes, meshes, runs, later tasks."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax import data, tasks
from mplug_jax.data import pipeline
from mplug_jax.data.examples import pretrain
from mplug_jax.data.sources import mixture
from mplug_jax.data.text import sentencepiece
from mplug_jax.data.text import tokenizer as tokenizer_lib
from mplug_jax.models.factory import build_model
from mplug_jax.parallel import batches as batches_lib
from mplug_jax.tasks import retrieval
from mplug_jax.training import gradients as gradients_lib
from mplug_jax.training import loop
from mplug_jax.training.build import build_for_evaluation
from tests.support import random_state, retrieval_files, shared_builds, tiny_run
from tests.support.pretrain_case import SMALL, config


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  folder, c = tmp_path_factory.mktemp("tokenizer"), config(**SMALL, tokenizer__records=100)
  sentencepiece.train_sentencepiece(
    data.texts(c, data.get_source(c, "train")), c.tokenizer.vocab_size, folder
  )
  return tokenizer_lib.load(folder)


def batch_of(c, tokenizer, rows=8):
  batches = pipeline.train_batches(
    data.get_source(c, "train"),
    data.make_transform(c, tokenizer, train=True),
    batch_size=rows,
    seed=0,
    threads=0,
  )
  out = {name: np.array(x) for name, x in next(batches).items()}
  batches.close()
  return out


# ---- examples


def test_masked_caption_prefix_and_target_are_parts_of_the_caption(tokenizer):
  c = config(**SMALL, data__mask_probability=0.4)
  batch = batch_of(c, tokenizer, 32)
  pad, bos, eos = tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id
  whole = lambda row: [i for i in row if i not in (pad, bos, eos)]  # noqa: E731
  cuts = set()
  for i in range(32):
    caption = batch["caption"][i]
    assert whole(batch["prefix"][i]) + whole(batch["target"][i]) == whole(caption)
    assert batch["prefix"][i, 0] == batch["target"][i, 0] == bos
    assert np.count_nonzero(batch["target"][i] == eos) == 1
    assert whole(batch["target"][i])
    hidden = batch["masked_label"][i] != pad
    assert (batch["masked_label"][i][hidden] == caption[hidden]).all()
    assert (batch["masked"][i][~hidden] == caption[~hidden]).all()
    cuts.add(len(whole(batch["prefix"][i])))
  assert 0 in cuts
  assert len(cuts) > 3
  c.data.empty_prefix = 1.0
  assert (batch_of(c, tokenizer, 32)["prefix"][:, 1] == pad).all()
  c.data.empty_prefix = 0.2
  assert (
    (batch["masked"] == tokenizer.mask_id).sum() > 0.6 * (batch["masked_label"] != pad).sum() > 20
  )
  spec = tasks.get("pretrain")(build_model(c, tokenizer), c, tokenizer).batch_spec(32)
  assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
    name: (x.shape, np.dtype(x.dtype)) for name, x in spec.items()
  }


def test_words_encoded_one_by_one_equal_the_caption(tokenizer):
  """Else masks of whole words and the split would not lie between words."""
  c = config(**SMALL)
  transform, source = data.make_transform(c, tokenizer, train=True), data.get_source(c, "train")
  for index in (0, 7, 100):
    words = source[index]["caption"].split(" ")
    assert [i for word in words for i in transform._pieces(word)] == tokenizer.encode(
      source[index]["caption"]
    )[1:]
  empty = transform(0, source[0] | {"caption": ""}, np.random.default_rng(0))
  assert empty["target"][:2].tolist() == [tokenizer.bos_id, tokenizer.eos_id]
  assert (empty["masked_label"] == tokenizer.pad_id).all()
  long = transform(0, source[0] | {"caption": "red " * 100}, np.random.default_rng(0))
  assert (long["caption"] != tokenizer.pad_id).all()
  assert tokenizer.eos_id in long["target"]


def test_files_are_mixed_by_their_weights(tmp_path):
  from PIL import Image

  Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
  for name, count in (("coco", 2), ("vg", 4)):
    rows = [
      {"image": "a.png", "image_id": f"{name}{i // 2}", "caption": [f"{name} caption {i}"]}
      for i in range(count)
    ]
    (tmp_path / f"{name}.json").write_text(json.dumps(rows))
  c = config(f"tiny,data=files,root={tmp_path}").unlock()
  c.data.train_files = tuple(str(tmp_path / f"{name}.json") for name in ("coco", "vg"))
  source = data.get_source(c, "train")
  assert isinstance(source, mixture.Mixture)
  assert [source[i]["id"] for i in range(len(source))] == [
    0,
    0,
    2,
    2,
    3,
    3,
  ]
  c.data.weights = (3, 1)
  assert len(data.get_source(c, "train")) == 16
  assert list(pretrain.texts(source)) == [f"coco caption {i}" for i in range(2)] + [
    f"vg caption {i}" for i in range(4)
  ]


# ---- losses


@pytest.fixture(scope="module", params=[2, 1], ids=["connected", "no connected layer"])
def case(request, tokenizer):
  """Built run, state with another teacher, a batch with a corrupt row and a repeated image."""
  c = config(
    **SMALL,
    model__fusion_layers=request.param,
    task__mlm_alpha=0.4,
    task__negatives__greedy=True,
    **tiny_run.NO_DROPOUT,
  )
  built = build_for_evaluation(c, tokenizer, jax.devices()[:1])
  state = random_state.host_state(built, c.model.initializer_range)
  teacher = jax.tree.map(lambda x: x * np.float32(1.1), state.params)
  state = state.replace(step=np.int32(1), ema_params=teacher)
  batch = batch_of(c, tokenizer)
  batch["corrupt"][3], batch["id"][5] = True, batch["id"][4]
  batch["prefix"][:2, 1:] = tokenizer.pad_id
  return c, built, state, batch


def losses_and_separate_passes(task, key):
  """Function (params, state, batch) -> what the test of the losses compares.

  (Task.loss, (terms "itc" and "itm" of separate passes, extra state), loss normalizers, [logits of
  masked tokens, logits of the decoder], each of student and teacher).
  """

  def tokens(ids):
    return ids != task.tokenizer.pad_id

  def passes(m, batch):
    image = m.encode_image(retrieval.base.normalize(batch["image"]))
    caption = m.encode_text(batch["caption"], tokens(batch["caption"]))
    fused = {
      name: m.fuse(m.encode_text(batch[name], tokens(batch[name])), tokens(batch[name]), image)
      for name in ("masked", "prefix")
    }
    memory = m.memory(*fused["prefix"], tokens(batch["prefix"]))
    decoded = [
      m.decode(batch["target"], tokens(batch["target"]), read) for read in (memory, m.memory(image))
    ]
    alone = (
      tokens(batch["prefix"]).sum(axis=1) == 1
    )  # then the decoder reads what it reads in captioning
    return (
      m.mlm_logits(fused["masked"][1]),
      jnp.where(alone[:, None, None], *decoded[::-1]),
      (image, caption, *retrieval.base.contrastive_features(m, image, caption)),
    )

  def everything(params, state, batch):
    def both(_, params):
      return None, task.apply(params, passes, batch)

    models = jax.tree.map(lambda *x: jnp.stack(x), params, state.ema_params)
    *logits, (image, caption, *of_image_and_text) = jax.lax.scan(both, None, models)[1]
    (x, x_teacher), (y, y_teacher) = of_image_and_text
    features = {"image": x, "text": y, "teacher_image": x_teacher, "teacher_text": y_teacher}
    terms, _, extra, drawn = task.compare(params, state, features, batch, key)
    encoded = (image[0], x), (caption[0], tokens(batch["caption"]), y)
    others, _ = retrieval.RetrievalTask.rest(task, params, state, encoded, drawn, batch, key)
    return (
      task.loss(params, state, batch, key),
      (terms | others, extra),
      task.loss_normalizers(batch, key),
      logits,  # of student and teacher, traced and compiled once
    )

  return everything


def test_losses_equal_those_of_separate_passes(case, tokenizer):
  c, built, state, batch = case
  task, key = built.task, jax.random.key(0)

  (terms, metrics, extra), (apart, extra_apart), weights, (words, decoded) = jax.device_get(
    jax.jit(losses_and_separate_passes(task, key))(state.params, state, batch)
  )
  for name in ("itc", "itm"):
    np.testing.assert_allclose(terms[name], apart[name], rtol=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), extra, extra_apart)

  def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))

  def cross_entropy(logits, labels):
    return -np.take_along_axis(log_softmax(logits), labels[..., None], -1)[..., 0]

  masked, teacher = words
  valid = np.arange(8) != 3
  hidden = (batch["masked_label"] != tokenizer.pad_id) & valid[:, None]
  alpha = 0.4 * 1 / c.task.ramp_steps
  soft = -(np.exp(log_softmax(teacher)) * log_softmax(masked)).sum(-1)
  mlm = (1 - alpha) * cross_entropy(masked, batch["masked_label"]) + alpha * soft
  np.testing.assert_allclose(terms["mlm"], mlm[hidden].sum(), rtol=1e-4)
  target = (batch["target"][:, 1:] != tokenizer.pad_id) & valid[:, None]
  next_token = cross_entropy(decoded[0][:, :-1], batch["target"][:, 1:])
  np.testing.assert_allclose(terms["prefix_lm"], next_token[target].sum(), rtol=1e-4)
  assert {name: float(x) for name, x in weights.items()} == {
    "itc": 7,
    "itm": 7 + 2 * 7,
    "mlm": hidden.sum(),
    "prefix_lm": target.sum(),
  }
  assert all(
    0 <= metrics[name][0] <= metrics[name][1]
    for name in ("mlm_accuracy", "prefix_lm_accuracy", "itm_accuracy")
  )


@pytest.fixture(scope="module")
def placed(tokenizer):
  """Function (*mesh shape, parts, **config changes) -> (gradients, loss, extra after the step).

  State, batch and noise are always the same, dropout too unless it is changed.
  """
  states = {}

  def run(*shape, parts=1, **changes):
    c = config(
      **SMALL,
      **{"model__initializer_range": 0.1, "task__mlm_alpha": 0.4, "task__negatives__group": 4}
      | changes,
    )
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = shape
    batch = batch_of(c, tokenizer)
    built = loop.build(c, tokenizer, 10, 10, jax.devices()[: np.prod(shape)])
    with jax.set_mesh(built.mesh):
      state = states.setdefault(
        str(changes), random_state.host_state(built, c.model.initializer_range)
      ).replace(rng=jax.random.key(3))
      state = jax.tree.map(
        lambda x, a: jax.device_put(jnp.asarray(x), a.sharding), state, built.abstract
      )
      gradients, loss, _, extra = jax.jit(gradients_lib.make_gradients(built.task, parts))(
        state, batches_lib.put_batch(batch, built.mesh)
      )
      return tiny_run.flat(gradients), float(loss), tiny_run.flat(extra)

  return run


@pytest.mark.slow
def test_every_parameter_learns_equally_on_every_mesh(placed):
  gradients, loss, extra = placed(1, 1, 1)
  assert not [
    name
    for name, g in gradients.items()
    if np.abs(g).max() < 1e-6 and not name.endswith("key/bias")
  ]
  for shape in ((4, 2, 1), (2, 2, 2)):
    ours, our_loss, our_extra = placed(*shape)
    assert our_loss == pytest.approx(loss, rel=1e-5)
    tiny_run.assert_gradients_equal(ours, gradients)
    for name, x in our_extra.items():
      np.testing.assert_allclose(x, extra[name], atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("queue", [True, False])
def test_two_microbatches_equal_one(queue, placed):
  """With a teacher of features and words.

  And with none, where both sides of every similarity learn.
  """
  steady = tiny_run.NO_DROPOUT
  changes = (
    steady if queue else steady | {"task__queue": 0, "task__alpha": 0.0, "task__mlm_alpha": 0.0}
  )
  gradients, loss, extra = placed(1, 1, 1, **changes)
  for shape in ((1, 1, 1), (2, 2, 1)):
    ours, our_loss, our_extra = placed(*shape, parts=2, **changes)
    assert our_loss == pytest.approx(loss, rel=1e-5)
    assert our_extra.keys() == extra.keys()
    tiny_run.assert_gradients_equal(ours, gradients, 1e-5)
    for name, x in our_extra.items():
      np.testing.assert_allclose(x, extra[name], atol=1e-6, err_msg=name)


def test_run_on_two_devices_overfits_eight_pairs(tmp_path, monkeypatch):
  """All four losses go to the least they can be.

  Then captions and images find each other, and hidden words and endings are told. Hard negatives
  and queues lie across the devices.
  """
  build = functools.partial(shared_builds.build_drawn, devices=jax.devices()[:2])
  monkeypatch.setattr(loop, "build", build)
  folder = retrieval_files.write(tmp_path)
  files = {
    f"data__{name}": str(folder / f"coco_{split}.json")
    for name, split in (("val_file", "val"), ("test_file", "test"))
  }
  c = retrieval_files.files_config(
    folder,
    "pretrain",
    **files,
    total_steps=100,
    log_every=5,
    data__train_files=(str(folder / "coco_train.json"),),
    data__mask_probability=0.5,
    eval__limit=0,
    model__initializer_range=0.1,
    task__alpha=0.0,
    task__rerank_k=4,
    task__negatives__group=8,
    ema__decay=0.9,
    optim__name="adamw",  # whose steps take half as long as Muon's
    optim__b2=0.999,
    optim__schedule__name="constant",
    optim__lr=3e-3,
    optim__weight_decay=0.0,
  )
  train_batches = pipeline.train_batches

  def first_batch(*args, **options):
    batches = train_batches(*args, **options)
    yield from itertools.repeat(next(batches))

  monkeypatch.setattr(pipeline, "train_batches", first_batch)
  assert loop.train(c, tmp_path / "run") == 0
  *lines, evaluated = tiny_run.lines(tmp_path / "run")
  assert len(lines) == 20
  # Of the queue and the batch, 20 rows, an image has two or three, and each of them is right.
  itc = np.log([2, 3]).mean()
  assert any(
    line["train/loss_itc"] - itc < 0.05
    and all(line[f"train/loss_{name}"] < 0.01 for name in ("itm", "mlm", "prefix_lm"))
    for line in lines
  ), lines[-5:]
  assert lines[-1]["train/mlm_accuracy"] == lines[-1]["train/prefix_lm_accuracy"] == 1
  assert evaluated["test/r_mean"] == evaluated["test/similarity_r_mean"] == 100
