"""Attention maps against finite differences and known images, and the Explainer."""

import types

import jax
import numpy as np
import pytest
from PIL import Image

from mplug_jax import Clip
from mplug_jax.inference import attention_maps, explain
from mplug_jax.tasks import base
from tests.support import tiny_predictor


def made(folder, method, name, **changes):
  """Returns the task of a method of the tiny Predictor of configs/<name>.py, and its parameters."""
  predictor = tiny_predictor.predictor(folder, name, **changes)
  return predictor.task(method, predictor.config.data.get("frames", 0)), predictor.params


def rows(tokenizer, texts, length):
  """Returns i32[len(texts), length]: [bos] pieces [eos] pad..."""
  ids = [tokenizer.encode(text) + [tokenizer.eos_id] for text in texts]
  return np.array([(row + [tokenizer.pad_id] * length)[:length] for row in ids], np.int32)


def looker(task):
  return jax.jit(lambda params, batch: attention_maps.look(task, params, batch))


@pytest.fixture(scope="module")
def image(tmp_path_factory):
  return tiny_predictor.photograph(tmp_path_factory.mktemp("image") / "wide.png", 96, 48)


@pytest.fixture(scope="module")
def explainer(tmp_path_factory):
  """Returns an Explainer of captions; images of 2 x 2 patches, one decoder layer of two heads."""
  changes = {"model__image_size": 32, "task__beams": 1, "task__max_length": 7}
  return explain.Explainer(
    tiny_predictor.predictor(tmp_path_factory.mktemp("tokenizer"), "caption", **changes)
  )


@pytest.fixture(scope="module")
def captions(explainer):
  """Returns (task, parameters, a batch as the explainer makes it, its jitted look)."""
  task = explainer._predictor.task("caption")
  batch = {
    "image": np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8),
    "caption": rows(task.tokenizer, ["a dog"], 8)[:, None],
    "caption_valid": np.ones((1, 1), bool),
  }
  return (
    task,
    explainer._predictor.params,
    batch,
    lambda params, batch: explainer._look("caption", 0)(params, batch)[0],
  )


def test_maps_are_relu_of_attention_times_its_gradient(captions):
  task, params, batch, look = captions
  looked = jax.tree.map(np.asarray, look(params, batch))
  words = int((batch["caption"][0] != task.tokenizer.pad_id).sum()) - 1
  assert words < 6
  assert looked.score.shape == (1, 7)
  assert looked.gradient.shape == looked.attention.shape == (1, 7, 1, 2, 2)
  losses, _ = jax.jit(lambda b: task.apply(params, task.predictions, b))(batch)
  np.testing.assert_allclose(looked.score[0, :words], -losses[0, :words], atol=1e-5)
  assert not looked.score[0, words:].any(), "padding has a score"
  assert not looked.gradient[0, words:].any(), "padding has a map"
  assert (looked.gradient >= 0).all()
  assert looked.gradient[:, :words].sum((2, 3, 4)).all()
  shares = looked.attention.sum((2, 3, 4))
  assert (shares > 0).all()
  assert (shares < 1).all(), "the class token has the rest"

  @jax.jit
  def score(added):
    """Scores the second word with `added` f32[heads, tokens] to its attention probabilities."""
    cross = np.zeros((1, 1, 2, 8, 5), np.float32)
    tree = {
      "text_decoder": {
        "layers": {
          "crossattention": {"probabilities": jax.numpy.asarray(cross).at[0, 0, :, 1].set(added)}
        }
      }
    }
    logits, sown = task.model.apply(
      {"params": params, "perturbations": tree},
      batch,
      method=task.forward,
      mutable=["intermediates"],
    )
    probabilities = sown["intermediates"]["text_decoder"]["layers"]["crossattention"][
      "probabilities"
    ][0, 0, :, 1]
    return jax.nn.log_softmax(logits[0, 1])[batch["caption"][0, 0, 2]], probabilities

  _, probabilities = score(np.zeros((2, 5), np.float32))
  gradients = np.zeros((2, 5))
  for position in np.ndindex(2, 5):
    step = np.zeros((2, 5), np.float32)
    step[position] = 1e-2
    gradients[position] = (score(step)[0] - score(-step)[0]) / 2e-2
  expected = np.maximum(np.asarray(probabilities) * gradients, 0).mean(0)[1:].reshape(2, 2)
  np.testing.assert_allclose(looked.gradient[0, 1, 0], expected, atol=2e-2 * expected.max())


def test_a_patch_that_alone_is_read_is_all_that_is_seen(captions):
  task, params, batch, look = captions
  params = jax.tree.map(np.array, params)
  encoder = params["visual_encoder"]
  cross = params["text_decoder"]["layers"]["crossattention"]
  for x in encoder["blocks"]["attention"]["out"].values():  # a token depends only on its patch
    x[:] = 0
  encoder["position_embedding"][:] = 0
  image = np.zeros((1, 32, 32, 3), np.uint8)
  image[0, :16, 16:] = 255
  tokens = jax.jit(lambda params: task.apply(params, base.encode_image, image))(params)
  black = np.asarray(tokens[0, 1])
  cross["value"]["bias"][:] = (
    -black @ cross["value"]["kernel"][0]
  )  # nothing is read of black patches
  result = np.array(look(params, batch | {"image": image}).gradient)[0, :3, 0]
  lit = result[:, 0, 1].copy()
  result[:, 0, 1] = 0
  assert lit.max() > 0
  assert result.max() < 1e-4 * lit.max()


def test_every_word_of_a_caption_has_its_maps(explainer, image, tmp_path):
  result = explainer.caption(image)
  assert " ".join(word.text for word in result.words) == " ".join(result.result.text.split())
  assert all(
    word.gradient.shape == word.attention.shape == (1, 2, 2) and word.gradient.max() > 0
    for word in result.words
  )
  np.testing.assert_allclose(result.map(), sum(word.gradient for word in result.words))
  assert result.images[0].shape == (48, 96, 3)
  assert result.overlay().shape == (144, 288, 3)
  result.save(tmp_path / "looked.png")
  with Image.open(tmp_path / "looked.png") as sheet:
    assert sheet.size[1] > 144
  with pytest.raises(ValueError, match="'heat' is not a map"):
    result.map("heat")


def stream(depth, **options):
  model = types.SimpleNamespace(fusion_layers=depth, image_size=4, patch_size=2)
  return attention_maps._Stream(model, np.zeros((1, 4, 4, 3)), 1, **{"separate": False, **options})


def one_hot(shape, *places):
  x = np.zeros(shape, np.float32)
  for position in places:
    x[position] = 1
  return {"probabilities": x}


def test_what_connected_layers_mixed_is_handed_back():
  # Token 2 of the image takes from token 4 in the connected layer; later text reads token 2, and so
  # does the decoder.
  text = one_hot((1, 1, 3, 3), (0, 0, 0, 1))
  connected = {
    "layer_0": {"attention": one_hot((1, 1, 8, 8), (0, 0, 2, 4), (0, 0, 6, 1))},
    "layer_1": {"attention": text, "crossattention": one_hot((1, 1, 3, 5), (0, 0, 1, 2))},
  }
  crossed = one_hot((1, 1, 1, 2, 8), (0, 0, 0, 1, 2), (0, 0, 0, 1, 5))
  decoder = {"layers": {"attention": one_hot((1, 1, 1, 2, 2)), "crossattention": crossed}}
  sown = {"fusion_encoder": connected, "text_decoder": decoder}
  result, shares = jax.jit(lambda sown: (stream(2).read(sown), stream(2).rollout(sown, 2)))(sown)
  np.testing.assert_allclose(
    result, [[0, 1, 1, 0, 1]]
  )  # 1: text read it; 2 and 4: half each of what two readers had of 2
  # The second position holds image token 2 (2 and 4, half each) and text token 0, which has image
  # token 1 from text token 1.
  np.testing.assert_allclose(shares, [[[0, 0, 0, 0, 0], [0, 0.5, 0.25, 0, 0.25]]], atol=1e-6)


@pytest.mark.slow
def test_answers(tmp_path):
  task, params = made(tmp_path, "answer", "vqa", data__questions_per_image=1)
  batch = {
    "image": np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8),
    "question": rows(task.tokenizer, ["is there a red dog?", "what"], 16)[:, None],
    "answer": rows(task.tokenizer, ["yes", "no"], 6)[:, None, None],
  }
  looked = jax.tree.map(np.asarray, looker(task)(params, batch))
  losses, _ = task.apply(params, task.predictions, batch)
  words = batch["answer"][:, 0, 0, 1:] != task.tokenizer.pad_id
  np.testing.assert_allclose(looked.score, np.where(words, -losses, 0), atol=1e-5)
  assert ((looked.gradient.sum((2, 3, 4)) > 0) == words).all()
  assert looked.gradient.shape == (
    2,
    5,
    1,
    2,
    2,
  )
  # A row does not depend on other rows or on the padding of its question.
  batch["question"][0] = rows(task.tokenizer, ["there is no yes on the left, in the image"], 16)
  np.testing.assert_allclose(looker(task)(params, batch).gradient[1], looked.gradient[1], atol=1e-6)
  batch["question"] = batch["question"][
    ..., : int((batch["question"][1, 0] != task.tokenizer.pad_id).sum())
  ]
  np.testing.assert_allclose(looker(task)(params, batch).gradient[1], looked.gradient[1], atol=1e-5)


@pytest.mark.slow
def test_matches_boxes_classes_and_clips(tmp_path):
  rng = np.random.default_rng(0)
  task, params = made(tmp_path / "a", "match", "pretrain")
  size = task.model.image_size
  batch = {
    "image": rng.integers(0, 256, (2, size, size, 3), np.uint8),
    "caption": rows(task.tokenizer, ["a red dog", "no"], task.config.data.max_caption),
  }
  looked = looker(task)(params, batch)
  assert looked.score.shape == (2, 1)
  assert looked.gradient.shape == (2, 1, 1, size // 16, size // 16)
  assert looked.gradient.sum() > 0

  task, params = made(tmp_path / "b", "locate", "grounding", data__expressions_per_image=1)
  size = task.model.image_size
  bins = rng.integers(0, 97, (2, 1, 4))
  image = rng.integers(0, 256, (2, size, size, 3), np.uint8)
  batch = {
    "image": image,
    "placed": np.array([[0, 0, size, size]] * 2, np.int32),
    "bins": bins,
    "size": np.ones((2, 2), np.int32),
    "phrase": rows(task.tokenizer, ["red dog", "circle"], task.config.data.max_phrase)[:, None],
    "box": attention_maps.box_of_bins(bins, 96).astype(np.float32),
  }
  looked = looker(task)(params, batch)
  assert looked.score.shape == (2, 4)
  assert (looked.gradient.sum((2, 3, 4)) > 0).all()
  batch["box"] = np.roll(batch["box"], 1, 0)  # other tokens before the ones that are scored
  assert np.abs(looker(task)(params, batch).score - looked.score)[:, 1:].max() > 1e-4

  for method, name, pairing in (
    ("entails", "snli_ve", "shared"),
    ("compare", "nlvr2", "shared"),
    ("compare", "nlvr2", "duplicated"),
  ):
    task, params = made(tmp_path / name, method, name, model__pairing=pairing)
    count = task.config.data.images_per_text
    size = task.model.image_size
    batch = {
      "image": rng.integers(0, 256, (2, count, size, size, 3), np.uint8),
      "label": np.array([[0], [1]]),
      "sentence": rows(task.tokenizer, ["red dog", "no"], task.config.data.max_text)[:, None],
    }
    looked = looker(task)(params, batch)
    assert looked.gradient.shape[:3] == (2, 1, count)
    assert (looked.gradient.sum((3, 4)) > 0).all()
    assert (looked.attention.sum((3, 4)) > 0).all()

  task, params = made(tmp_path / "c", "answer", "video_qa", data__questions_per_image=1)
  frames = task.config.data.frames
  size = task.model.image_size
  batch = {
    "image": rng.integers(0, 256, (2, frames, size, size, 3), np.uint8),
    "question": rows(task.tokenizer, ["is there", "what"], task.config.data.max_question)[:, None],
    "answer": rows(task.tokenizer, ["yes", "no"], 4)[:, None, None],
  }
  assert looker(task)(params, batch).gradient.shape == (2, 3, frames, size // 16, size // 16)


@pytest.mark.slow
def test_explanations_of_everything_else(tmp_path, image):
  clip = Clip((image,) * 3)
  answers = explain.Explainer(tiny_predictor.predictor(tmp_path / "a", "vqa"))
  for shown, frames in ((image, 1), (clip, 8)):
    result = answers.answer(shown, "is there a red dog?")
    assert result.result == answers._predictor.answer(shown, "is there a red dog?")
    assert result.map().shape == (frames, 2, 2)
  other = answers.answer(image, "is there a red dog?", "yes no")
  assert [word.text for word in other.words] == ["yes", "no"]
  assert other.result.text == "yes no"
  other.save(tmp_path / "answer.png", "attention")

  pre_trained = explain.Explainer(tiny_predictor.predictor(tmp_path / "b", "pretrain"))
  result = pre_trained.match(image, "a red dog")
  odds = result.result.probability / (1 - result.result.probability)
  np.testing.assert_allclose(result.words[0].score, np.log(odds), atol=1e-4)
  assert pre_trained.answer(image, "what").map().max() > 0
  assert pre_trained.caption(image).map().max() > 0

  grounding = explain.Explainer(tiny_predictor.predictor(tmp_path / "c", "grounding"))
  result = grounding.locate(image, "the red dog")
  expected = grounding._predictor.locate(image, "the red dog")
  np.testing.assert_allclose(result.result, expected, rtol=1e-5)
  np.testing.assert_allclose(sum(word.score for word in result.words), expected.score, atol=1e-4)
  width, height = Image.open(image).size
  assert min(expected[:4]) >= 0
  assert max(expected[0], expected[2]) <= width
  assert max(expected[1], expected[3]) <= height
  size = grounding._predictor.config.model.image_size
  assert result.map().shape == (1, size // 2, size)
  assert result.boxes
  result.save(tmp_path / "box.png")

  entails = explain.Explainer(tiny_predictor.predictor(tmp_path / "d", "snli_ve"))
  result = entails.entails(image, "a red dog")
  np.testing.assert_allclose(np.exp(result.words[0].score), result.result.score, rtol=1e-4)
  compare = explain.Explainer(tiny_predictor.predictor(tmp_path / "e", "nlvr2"))
  result = compare.compare((image, image), "no dogs")
  np.testing.assert_allclose(np.exp(result.words[0].score), result.result.score, rtol=1e-4)
  assert len(result.images) == 2
  assert result.map().shape[0] == 2
  result.save(tmp_path / "pair.png")
