"""VQA runs of the tiny preset on official, custom and generated data."""

import json

import numpy as np
import pytest

from mplug_jax.checkpoints import reading
from mplug_jax.data.examples import vqa_answers
from mplug_jax.data.sources import vqa
from mplug_jax.data.text import tokenizer, wordpiece
from mplug_jax.reporting.metric_log import read_metrics
from mplug_jax.training import evaluate, loop
from tests.support import tiny_run, vqa_files, word_list

pytestmark = pytest.mark.usefixtures("drawn_start")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return vqa_files.write(tmp_path_factory.mktemp("vqa"))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
  """A finished run: (its folder, its config)."""
  workdir, config = tmp_path_factory.mktemp("run"), vqa_files.config(folder)
  assert loop.train(config, str(workdir)) == 0
  return workdir, config


def predictions(workdir, file):
  """{question_id: answer} of a results file, whose format is the VQA server's.

  Its questions are those of `file`, in order.
  """
  rows = json.loads((workdir / "predictions.json").read_text())
  assert all(
    row.keys() == {"question_id", "answer"} and isinstance(row["answer"], str) for row in rows
  )
  entries = json.loads(file.read_text())
  assert [row["question_id"] for row in rows] == [entry["question_id"] for entry in entries]
  return {row["question_id"]: row["answer"] for row in rows}


def accuracy(answers, file):
  """Percent of VQA accuracy, for answers that the official normalisation leaves as they are."""
  scores = []
  for entry in json.loads(file.read_text()):
    others = [entry["answer"][:i] + entry["answer"][i + 1 :] for i in range(10)]
    scores.append(
      np.mean([min(1.0, rest.count(answers[entry["question_id"]]) / 3) for rest in others])
    )
  return 100 * np.mean(scores)


def test_train_and_evaluate_on_the_official_format(folder, run):
  workdir, _ = run
  answers = predictions(workdir, folder / "vqa_val.json")
  assert answers[100] == "yes"  # most of what it was trained on
  result = json.loads((workdir / "result.json").read_text())
  assert result["step"] == 12
  assert result["metric"] == "accuracy"
  # Of five questions, two have only "yes", two mostly "yes" (six of ten), one only "no".
  assert result["metrics"]["accuracy"] == pytest.approx(accuracy(answers, folder / "vqa_val.json"))
  assert result["metrics"]["accuracy"] > 60
  assert "corrupt_images" not in result["metrics"]
  left = {p.name for p in workdir.iterdir()}
  assert {
    "config.json",
    "parameters.txt",
    "predictions.png",
    "curves.png",
    "tokenizer",
    "checkpoints",
  } <= left
  rows = read_metrics(workdir / "metrics.jsonl")
  losses = [row["train/loss"] for row in rows if "train/loss" in row]
  assert len(losses) == 3
  assert losses[-1] < 0.7 * losses[0]
  assert all(row.get("train/corrupt_images", 0) == 0 for row in rows)
  assert [row["val/accuracy"] for row in rows if "val/accuracy" in row] == [
    pytest.approx(result["metrics"]["accuracy"])
  ]


def test_split_without_answers_gets_a_results_file(folder, run, tmp_path, capsys):
  workdir, config = run
  config = config.copy_and_resolve_references()
  config.eval.split = "test"
  assert evaluate.evaluate(config, str(tmp_path), str(workdir)) == {}
  predictions(tmp_path, folder / "vqa_test.json")
  assert capsys.readouterr().out.splitlines()[-1] == "final: no answers to compare with"
  assert not (tmp_path / "checkpoints").exists()


def test_ranking_of_given_answers(folder, run, tmp_path, capsys):
  """Given in a list or in a file, which is all that the two differ in."""
  workdir, config = run
  config = config.copy_and_resolve_references()
  candidates = ("red", "no", "two of it", "yes")
  config.task.predict, config.task.rank_top_k = "rank", 3
  config.task.rank_answers = candidates
  assert tuple(vqa_answers.candidate_answers(config)) == candidates
  config.task.rank_answers = ()
  (tmp_path / "answers.json").write_text(json.dumps(candidates))
  config.data.answer_list = str(tmp_path / "answers.json")
  assert tuple(vqa_answers.candidate_answers(config)) == candidates
  result = evaluate.evaluate(config, str(tmp_path), str(workdir))
  answers = predictions(tmp_path, folder / "vqa_val.json")
  assert set(answers.values()) <= set(candidates)
  assert answers == predictions(workdir, folder / "vqa_val.json")
  assert result["accuracy"] == pytest.approx(accuracy(answers, folder / "vqa_val.json"))
  assert capsys.readouterr().out.splitlines()[-1] == f"final: accuracy {result['accuracy']:.2f}"


def test_ranking_without_answers_raises_early(folder, run, tmp_path):
  config = run[1].copy_and_resolve_references()
  config.task.predict = "rank"
  with pytest.raises(
    ValueError,
    match="config.task.predict=rank chooses from config.task.rank_answers, or .* "
    "config.data.answer_list",
  ):
    loop.train(config, str(tmp_path))
  config.task.predict = "guess"
  with pytest.raises(ValueError, match="config.task.predict='guess' is not one of generate, rank"):
    loop.train(config, str(tmp_path))
  assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir())


def test_custom_data_as_json_lines(folder, tmp_path):
  lines = [
    {
      "image": f"coco/train/{i % 6}.jpg",
      "question": "Is there a dog?",
      "answer": ["yes", "no"][i % 2],
    }
    for i in range(7)
  ]
  for name in ("train.jsonl", "val.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
  (tmp_path / "coco").symlink_to(folder / "coco")
  (tmp_path / "vocab.txt").symlink_to(folder / "vocab.txt")
  config = vqa_files.config(tmp_path, "jsonl", total_steps=2)
  assert loop.train(config, str(tmp_path / "run")) == 0
  rows = json.loads((tmp_path / "run" / "predictions.json").read_text())
  assert [row["question_id"] for row in rows] == list(range(7))
  expected = np.mean([row["answer"] == line["answer"] for row, line in zip(rows, lines)])
  assert json.loads((tmp_path / "run" / "result.json").read_text())["metrics"][
    "accuracy"
  ] == pytest.approx(100 * expected)


@pytest.mark.slow
def test_generated_scenes(tmp_path):
  """The tiny preset at the scenes' 96 pixels; results by family of questions."""
  source = vqa.get(tiny_run.config("tiny,data=scenes").data, "train")
  words = {
    word
    for i in range(40)
    for q in vqa.questions_of(source, i)
    for text in (q["question"], *q["answers"])
    for word in text.split()
  }
  words = sorted({word.rstrip("?,.") for word in words} - {""})
  (tmp_path / "vocab.txt").write_text(word_list.text("?", *words))
  config = vqa_files.config(
    tmp_path, "scenes", data__max_question=24, data__max_answers=1, eval__limit=8
  )
  assert config.model.image_size == 96
  assert config.eval.split == "test"
  assert loop.train(config, str(tmp_path / "run")) == 0
  result = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
  test = vqa.get(config.data, "test")
  families = {q["family"] for i in range(8) for q in vqa.questions_of(test, i)}
  assert {f"accuracy_{family}" for family in families} | {"accuracy", "majority_answer"} == set(
    result
  )
  assert len(json.loads((tmp_path / "run" / "predictions.json").read_text())) == 64


def test_run_folder_contains_its_tokenizer(folder, run):
  workdir, _ = run
  saved = tokenizer.load(workdir / "tokenizer")
  assert saved.fingerprint == wordpiece.WordPieceTokenizer(folder / "vocab.txt").fingerprint
  assert reading.load_extra(workdir) == {"step": 12, "tokenizer": saved.fingerprint}
