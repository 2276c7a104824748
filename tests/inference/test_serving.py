"""Exports for serving give the Predictor's results for any number of rows."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from mplug_jax.inference.serving import export, inputs
from tests.support import tiny_predictor, tiny_run

pytest.importorskip("flatbuffers")

TEXTS = ["A red shape, on the left (of two)!", "no dogs", "the <person> is - not / there?"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  folder = tmp_path_factory.mktemp("images")
  return [
    tiny_predictor.photograph(folder / f"{n}.png", *size)
    for n, size in enumerate(((90, 60), (64, 64), (40, 120)))
  ]


def served(folder):
  """Returns (serving.json, its tokenizer, function (name, images, texts) -> arrays)."""
  about = json.loads((folder / "serving.json").read_text())
  tokenizer = inputs.Tokenizer(folder, about["tokenizer"])
  weights = inputs.read_weights(folder / "weights.safetensors")

  def run(name, images=(), texts=()):
    call = jax.jit(jax.export.deserialize(bytearray((folder / f"{name}.jax").read_bytes())).call)
    return jax.tree.map(
      np.asarray, call(weights, inputs.make_batch(about, name, tokenizer, images, texts))
    )

  return about, tokenizer, run


def close(result, expected):
  np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_answers_of_the_export_are_those_of_the_predictor(tmp_path, images):
  predictor = tiny_predictor.predictor(tmp_path / "tokenizer", "vqa")
  about = export.export(predictor, tmp_path / "served")
  assert about["platforms"] == ["cpu", "cuda", "tpu"]
  assert about["functions"]["answer"]["inputs"]["question"]["shape"] == ["b", "q", 16]
  _, tokenizer, run = served(tmp_path / "served")
  texts = [
    ["what is the blue shape?", "is there a circle?"],
    ["Is there NOT a red dog?", "no"],
    ["yes", "what " * 40],
  ]
  with pytest.warns(UserWarning, match="cut"):
    expected = predictor.answer(images, texts, truncate=True)
  result = run("answer", images, texts)
  assert [list(map(tokenizer.decode, row)) for row in result["tokens"]] == [
    [answer.text.strip() for answer in row] for row in expected
  ]
  close(result["score"], [[answer.score for answer in row] for row in expected])
  one = run("answer", images[1:2], texts[1][:1])
  assert (one["tokens"][0] == result["tokens"][1, :1]).all()
  assert len({answer.text for row in expected for answer in row}) > 1, (
    "all answers alike prove little"
  )
  with pytest.raises(FileExistsError, match="exists"):
    export.export(predictor, tmp_path / "served")
  tiny_run.refused(lambda: export.export(predictor, tmp_path / "other", ["fly"]), "'fly'", "answer")
  tiny_run.refused(
    lambda: export.export(predictor, tmp_path / "other", ["locate"]), "cannot locate"
  )
  assert not list(tmp_path.glob("other*"))


@pytest.mark.slow
def test_wordpieces_and_ranked_answers(tmp_path, images):
  predictor = tiny_predictor.predictor(
    tmp_path / "tokenizer",
    "vqa",
    tokenizer__kind="wordpiece",
    task__predict="rank",
    task__rank_answers=("yes", "no", "red dogs"),
  )
  export.export(predictor, tmp_path / "served")
  about, tokenizer, run = served(tmp_path / "served")
  assert about["functions"]["answer"]["answers"] == ["yes", "no", "red dogs"]
  expected = predictor.answer(images, TEXTS)
  result = run("answer", images, TEXTS)
  assert [["yes", "no", "red dogs"][n] for n in result["answer"][:, 0, 0]] == [
    answer.text.strip() for answer in expected
  ]
  close(result["probability"][:, 0, 0], [answer.score for answer in expected])
  ids = predictor.tokenizer.encode("is there no red dogs? isn't it two's")
  assert tokenizer.decode(ids) == predictor.tokenizer.decode(ids)


@pytest.mark.slow
def test_all_that_a_pre_trained_model_does(tmp_path, images):
  predictor = tiny_predictor.predictor(tmp_path / "tokenizer", "pretrain")
  about = export.export(predictor, tmp_path / "served")
  assert set(about["functions"]) == {"answer", "caption", "match", "embed_image", "embed_text"}
  _, tokenizer, run = served(tmp_path / "served")
  close(run("embed_image", images)["feature"], predictor.embed(images))
  close(run("embed_text", (), TEXTS)["feature"], predictor.embed(texts=TEXTS))
  result = run("match", images, TEXTS)
  expected = predictor.match(images, TEXTS)
  close(result["probability"], np.diag(expected.probability))
  close(result["similarity"], np.diag(expected.similarity))
  assert [tokenizer.decode(row) for row in run("caption", images)["tokens"]] == [
    caption.text for caption in predictor.caption(images)
  ]
  result = run("answer", images, TEXTS)
  expected = predictor.answer(images, TEXTS)
  assert [tokenizer.decode(row[0]) for row in result["tokens"]] == [
    answer.text.strip() for answer in expected
  ]


@pytest.mark.slow
def test_boxes(tmp_path, images):
  predictor = tiny_predictor.predictor(tmp_path / "tokenizer", "grounding")
  export.export(predictor, tmp_path / "served")
  _, _, run = served(tmp_path / "served")
  result = run("locate", images, TEXTS)
  np.testing.assert_allclose(
    np.concatenate([result["box"][:, 0], result["score"]], 1),
    np.array(predictor.locate(images, TEXTS)),
    rtol=1e-5,
  )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [("snli_ve", "entails"), ("nlvr2", "compare")])
def test_statements_about_one_or_two_images(tmp_path, images, name, method):
  predictor = tiny_predictor.predictor(tmp_path / "tokenizer", name)
  export.export(predictor, tmp_path / "served")
  about, _, run = served(tmp_path / "served")
  options = images if method == "entails" else [(images[n], images[n - 1]) for n in range(3)]
  expected = getattr(predictor, method)(options, TEXTS)
  assert about["functions"][method]["labels"] == list(expected[0].scores)
  close(
    run(method, options, TEXTS)["probability"], [list(label.scores.values()) for label in expected]
  )


@pytest.mark.slow
def test_the_example_runs_without_this_package(tmp_path, images):
  predictor = tiny_predictor.predictor(tmp_path / "tokenizer", "caption")
  export.export(predictor, tmp_path / "served")
  program = (
    "import runpy, sys; sys.modules['mplug_jax'] = None; sys.path.insert(0, sys.argv[1]); "
    "sys.argv = ['serve.py', *sys.argv[2:]]; "
    "runpy.run_path(sys.path[0] + '/serve.py', run_name='__main__')"
  )
  done = subprocess.run(
    [sys.executable, "-c", program, str(tmp_path / "served"), "caption", str(images[0])],
    capture_output=True,
    text=True,
    cwd=tmp_path,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == predictor.caption(images[0]).text
