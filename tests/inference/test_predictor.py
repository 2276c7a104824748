"""Predictor on tiny runs with random weights: the results of evaluation, in any batch; errors."""

import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import mplug_jax
from mplug_jax import data, tasks
from mplug_jax.data.examples import caption
from mplug_jax.data.sources import vqa as sources
from mplug_jax.inference import methods
from tests.support import predictor_run

QUESTIONS = ("is there a red circle?", "what color is the square?", "how many?")


@pytest.fixture(scope="module")
def images():
  """Returns very different pictures of various sizes."""
  rng = np.random.default_rng(0)
  return [
    (rng.uniform(0, 1, 3) * rng.integers(0, 256, (*rng.integers(30, 70, 2), 3))).astype(np.uint8)
    for _ in range(70)
  ]


@pytest.fixture(scope="module")
def vqa(tmp_path_factory):
  return predictor_run.save(tmp_path_factory.mktemp("vqa"), predictor_run.config("vqa"))


def load(folder, **options):
  return mplug_jax.Predictor.load(folder, devices=jax.devices()[:1], **options)


def test_answers_are_those_of_evaluation(vqa):
  predictor = load(vqa, batch_size=1)
  c = predictor.config
  records = [sources.get(c.data, "test")[i] for i in range(2)]
  asked = [
    [q["question"] for q in record["questions"][: c.data.questions_per_image]] for record in records
  ]
  records = [
    record | {"questions": record["questions"][: c.data.questions_per_image]} for record in records
  ]
  transform = data.make_transform(c, predictor.tokenizer, train=False)
  batch = {
    k: np.stack([transform(i, record, None)[k] for i, record in enumerate(records)])
    for k in ("image", "question")
  }
  task = tasks.get("vqa")(predictor.model, c, predictor.tokenizer)
  out = jax.device_get(jax.jit(task.predict_fns()["generate"])(predictor.params, batch))
  result = predictor.answer([record["image"] for record in records], asked)
  for i, row in enumerate(result):
    for j, answer in enumerate(row):
      assert answer.text == predictor.tokenizer.decode(out["tokens"][i, j, : out["length"][i, j]])
      assert abs(answer.score - out["score"][i, j]) < 1e-5
  assert predictor.answer(records[0]["image"], asked[0][0]) == result[0][0]


def test_a_checkpoint_says_what_it_cannot_do(vqa, images):
  predictor = load(vqa, batch_size=4)
  for call, message in (
    (
      lambda: predictor.caption(images[0]),
      "cannot tell what it sees: it was trained for vqa; train one with --config=configs/caption",
    ),
    (
      lambda: predictor.match(images[0], "a"),
      "a vqa checkpoint has no vision_proj, text_proj, itm_head, temp",
    ),
    (lambda: predictor.embed(images[0]), "configs/retrieval.py"),
    (lambda: predictor.index(images), "configs/retrieval.py"),
    (lambda: predictor.locate(images[0], "a"), "configs/grounding.py"),
    (lambda: predictor.entails(images[0], "a"), "no cls_head"),
    (lambda: predictor.compare((images[0], images[1]), "a"), "configs/nlvr2.py"),
    (lambda: predictor.answer(images[0], ""), "is empty"),
    (lambda: predictor.answer(np.zeros((0, 3, 3), np.uint8), "what?"), "zero pixels"),
    (lambda: predictor.answer(images[0], "what? " * 60), "truncate=True"),
    (lambda: predictor.answer(images[0], "what?", candidates=[]), "candidates"),
  ):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
      call()
    assert "\n" not in str(error.value)


def test_checkpoints_that_cannot_be_used(tmp_path, vqa):
  for path, options, message in (
    (tmp_path / "none", {}, "No such checkpoint"),
    (tmp_path, {}, "neither a run folder"),
    (vqa, {"batch_size": -1}, "batch_size"),
  ):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      mplug_jax.Predictor.load(path, **options)


def test_the_package_starts_without_jax():
  code = (
    "import sys, mplug_jax; assert 'jax' not in sys.modules; mplug_jax.Clip; assert 'jax' "
    "not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_every_method_names_a_task_and_a_config():
  for name, method in methods.METHODS.items():
    assert (predictor_run.tiny_run.ROOT / method.config).exists()
    assert tasks.get(method.task)
    assert hasattr(mplug_jax.Predictor, name)


# ---- every method, in batches of one and of several


def ask_all(predictor, name, images, order):
  """{what: results in the order of `images`} of all that a checkpoint can do, asked in `order`."""
  shown = [images[i] for i in order]
  back = np.argsort(order)

  def asked(call, texts):
    results = call(shown, [texts[i % len(texts)] for i in order])
    return [results[i] for i in back]

  if name == "pretrain":
    texts = ("a red square", "a small blue circle above a star", "two triangles")
    result = predictor.caption(shown, n=2)
    match = predictor.match(shown, list(texts))
    index = predictor.index(shown)
    hits = predictor.search(texts[0], index, k=len(images), candidates=len(images))
    prompted = predictor.caption(shown, prompt="there is")
    return {
      "answer": asked(predictor.answer, QUESTIONS),
      "caption": [result[i] for i in back],
      "prompted": [prompted[i] for i in back],
      "similarity": [match.similarity[i] for i in back],
      "probability": [match.probability[i] for i in back],
      "features": [predictor.embed(shown)[i].tolist() for i in back],
      "texts": predictor.embed(texts=texts).tolist(),
      "search": sorted((int(order[hit.number]), hit.score, hit.similarity) for hit in hits),
      "ranked": [(int(order[hit.number]), hit.score) for hit in hits],
      "chosen": asked(
        lambda *args: predictor.answer(*args, candidates=["red", "a blue circle", "two"]), QUESTIONS
      ),
    }
  if name == "grounding":
    return {"locate": asked(predictor.locate, ("the red square", "the star left of the circle"))}
  if name == "snli_ve":
    return {"entails": asked(predictor.entails, ("a red square", "the star is left of the circle"))}
  partners = [(images[i], images[(i + 1) % len(images)]) for i in order]
  results = predictor.compare(
    partners, ["exactly one image shows a star" if i % 2 else "both show a circle" for i in order]
  )
  return {"compare": [results[i] for i in back]}


def assert_same(one, other):
  """Checks for the same texts, and the same numbers within 1e-5.

  Of the ranked list, places may change where scores are that close.
  """
  assert one.keys() == other.keys()
  for name in one.keys() - {"ranked"}:
    assert_close(one[name], other[name], name)
  for (i, a), (j, b) in zip(one.get("ranked", ()), other.get("ranked", ())):
    assert i == j or abs(a - b) < 1e-5


def assert_close(a, b, name):
  if isinstance(a, float):
    assert abs(a - b) <= 1e-5 * max(1, abs(a) if name in ("locate", "search") else 1), (name, a, b)
  elif isinstance(a, dict):
    assert_close(list(a.items()), list(b.items()), name)
  elif isinstance(a, (list, tuple)):
    assert len(a) == len(b)
    for x, y in zip(a, b):
      assert_close(x, y, name)
  else:
    assert a == b, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "grounding", "snli_ve", "nlvr2"])
def test_results_depend_neither_on_the_batch_nor_on_the_order(name, tmp_path, images):
  folder = predictor_run.save(tmp_path / name, predictor_run.config(name))
  images = images[:67]  # 64 and 3: a full batch and a padded one
  alone = ask_all(load(folder, batch_size=1), name, images, np.arange(67))
  together = ask_all(
    load(folder, batch_size=64), name, images, np.random.default_rng(1).permutation(67)
  )
  if name == "pretrain":
    gaps = [first.score - second.score for first, second in alone["caption"]]
    assert np.median(gaps) > 1e-4
    assert np.ptp([score for _, score in alone["ranked"]]) > 1e-2
  assert_same(alone, together)
  assert_same(
    alone,
    ask_all(mplug_jax.Predictor.load(folder, batch_size=16), name, images, np.arange(67)[::-1]),
  )  # eight devices


@pytest.mark.slow
def test_clips_and_images_together(tmp_path, images):
  predictor = load(predictor_run.save(tmp_path, predictor_run.config("pretrain")), batch_size=4)
  clip = np.stack([np.resize(image, (32, 32, 3)) for image in images[:9]])
  mixed = [clip, images[0], mplug_jax.Clip(tuple(clip)), images[1]]
  result = predictor.caption(mixed)
  assert result[0] == result[2]
  assert result[1].text == predictor.caption(images[0]).text
  assert predictor.embed(clip).shape == (32,)
  assert predictor.answer(clip, "what?")
  assert len(predictor.index(mixed).images) == 4
  still = np.repeat(clip[:1], 8, axis=0)
  np.testing.assert_allclose(predictor.embed(still), predictor.embed(clip[0]), atol=1e-5)


@pytest.mark.slow
def test_runs_of_every_task_are_used_at_once(tmp_path, images):
  for name, call in (
    ("caption", lambda p: p.caption(images[0], n=2)),
    ("caption_scst", lambda p: p.caption(images[0])),
    ("retrieval", lambda p: p.match(images[0], "a red square")),
  ):
    predictor = load(predictor_run.save(tmp_path / name, predictor_run.config(name)), batch_size=1)
    assert call(predictor)
  assert caption.prompt(predictor_run.config("caption"), predictor.tokenizer).text == ""
