"""VQA answers against recordings of the official evaluation code, and brute force."""

import json
import os
import random

import numpy as np
import pytest

from mplug_jax.metrics import vqa_accuracy as va
from tests.support import paths

GOLDEN = json.loads((paths.GOLDEN / "vqa_eval.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["normalisation"], ids=lambda case: repr(case["input"]))
def test_normalization_stages(case):
  assert va.strip_punctuation(case["stripped"]) == case["processPunctuation"]
  assert va.normalize_words(case["input"]) == case["processDigitArticle_of_raw"]
  assert va.normalize(case["input"]) == case["full"]


@pytest.mark.parametrize("case", GOLDEN["sets"], ids=lambda case: case["result"].strip())
def test_answer_sets(case):
  assert va.reference_answers(case["answers"], "2017") == case["answers_after"]
  accuracy = va.vqa_accuracy(case["result"], case["answers"], case["answer_ids"], "2017")
  assert round(100 * accuracy, 2) == case["accuracy"] == case["evalQA"]


def test_batch_and_groups():
  batch = GOLDEN["batch"]
  scores = {
    i: va.vqa_accuracy(
      batch["results"][i]["answer"], [a["answer"] for a in q["answers"]], script="2017"
    )
    for i, q in batch["questions"].items()
  }
  assert {i: round(100 * s, 2) for i, s in scores.items()} == batch["evalQA"]
  assert round(100 * np.mean(list(scores.values())), 2) == batch["accuracy"]["overall"]
  for kind, expected in (("question_type", "perQuestionType"), ("answer_type", "perAnswerType")):
    groups = {i: q[kind] for i, q in batch["questions"].items()}
    means = va.mean_by_group(scores, groups)
    assert {k: round(100 * v, 2) for k, v in means.items()} == batch["accuracy"][expected]
  with pytest.raises(ValueError, match="'3' has no group"):
    va.mean_by_group(scores, {"0": "a", "1": "a", "2": "a"})


def test_soft_labels():
  golden = GOLDEN["cal_metric"]
  label = {row["question_id"]: row["label"] for row in golden["labels"]}
  scores = [va.soft_label_score(r["answer"], label[r["question_id"]]) for r in golden["results"]]
  assert np.mean(scores) == pytest.approx(golden["score"], abs=1e-12)


@pytest.mark.parametrize("script", va.SCRIPTS)
@pytest.mark.parametrize("answer_ids", [True, False])
def test_accuracy_leaves_out_each_annotator(answer_ids, script):
  rng = random.Random(0)
  for _ in range(300):
    answers = rng.choices(["red", "blue", "Red.", "2"], k=rng.randint(1, 12))
    prediction = rng.choice(["red", "Blue", "two", "green"])
    records = [
      {"answer": a} | ({"id": i} if answer_ids else {})
      for i, a in enumerate(va.reference_answers(answers, script))
    ]
    predicted = va.comparison(answers, script)(prediction)
    per_annotator = []
    for record in records:
      others = [r for r in records if r != record]
      n = sum(r["answer"] == predicted for r in others)
      per_annotator.append(min(1, n / 3))
    expected = sum(per_annotator) / len(per_annotator)
    accuracy = va.vqa_accuracy(prediction, answers, answer_ids, script)
    assert accuracy == pytest.approx(expected, abs=1e-12)


def test_every_contraction_loses_one_apostrophe():
  wrong_way_round = {"somebody'd": "somebodyd"}
  for short, full in va._CONTRACTIONS.items():
    assert va.normalize(short) == full
    if wrong_way_round.get(short) != full:
      assert len(short) == len(full) - 1
      assert short.replace("'", "") == full.replace("'", "")
  assert len(va._CONTRACTIONS) == 114  # the official table without its 4 "I..." keys and 2 no-ops


def test_no_answers_is_an_error():
  with pytest.raises(ValueError, match="annotators' answers is empty"):
    va.vqa_accuracy("yes", [])


@pytest.mark.parametrize(
  ("prediction", "truth", "equal"),
  [
    ("yes", "yes", True),
    ("Yes", " yes ", True),
    ("10 : 30", "10:30", True),
    ("t - shirt", "T-shirt", True),
    ("hot  dog", "hot dog", True),
    ("", "yes", False),
    ("hotdog", "hot dog", False),
    ("two", "2", False),
    ("a cat", "cat", False),
    ("tshirt", "t-shirt", False),
    ("1 2", "12", False),
  ],
)
def test_exact_match(prediction, truth, equal):
  assert va.exact_match(prediction, truth) is equal


def test_results_file(tmp_path):
  rows = va.results_rows([np.int64(30), "7", 4.0, "q9", "007"], ["yes", "café", "2", "no", "x"])
  assert rows == [
    {"question_id": 4, "answer": "2"},
    {"question_id": 7, "answer": "café"},
    {"question_id": 30, "answer": "yes"},
    {"question_id": "007", "answer": "x"},
    {"question_id": "q9", "answer": "no"},
  ]
  path = tmp_path / "results.json"
  path.write_text("old")
  va.write_results(path, rows)
  assert json.loads(path.read_text()) == rows
  assert os.listdir(tmp_path) == ["results.json"]


@pytest.mark.parametrize("second", ["yes", "no"])
def test_results_with_the_same_id_are_an_error(second):
  with pytest.raises(ValueError, match=f"question_id 7 occurs twice, .* 'yes' and '{second}'"):
    va.results_rows([7, "7"], ["yes", second])
  with pytest.raises(ValueError, match="2 question ids but 1 answers"):
    va.results_rows([1, 2], ["yes"])


# The two scripts of the benchmark, and own data.


def given(**times):
  """Answers of annotators, from {answer with _ for a space: times}."""
  return [answer.replace("_", " ") for answer, number in times.items() for _ in range(number)]


@pytest.mark.parametrize(
  ("prediction", "answers", "newest", "earlier"),
  [
    ("none", given(none=1, no_horses=4, nothing=5), 30, 0),
    ("a", given(a=10), 100, 0),
    ("two", given(two=10), 100, 0),
    ("2", given(two=10), 0, 0),
    ("2", given(two=9) + ["2"], 100, 30),
    ("t-shirt", ["t-shirt"] * 10, 100, 0),
    ("t shirt", ["t-shirt"] * 9 + ["shirt"], 100, 100),
    ("Black.", given(black=10), 0, 100),
    ("black", given(black=10), 100, 100),
    ("Black", given(black=9, dark=1), 100, 100),
    ("paris", given(Paris=8, france=2), 100, 0),
    ("paris", given(Paris=10), 0, 0),
    ("dont", ["don't"] * 7 + ["no"] * 3, 100, 100),
    ("yes", given(yes=10), 100, 100),
    ("yes", ["yes"] * 5 + ["yes\n"] * 5, 100, 100),  # the same once cleaned, so unanimous
    ("YES", ["yes"] * 5 + [" yes\t"] * 5, 0, 100),
    ("yes\n", given(yes=10), 100, 100),
    ("the man", given(a_man=3, woman=7), 90, 0),
  ],
)
def test_scripts_of_2021_and_2017(prediction, answers, newest, earlier):
  assert 100 * va.vqa_accuracy(prediction, answers) == pytest.approx(newest)
  assert 100 * va.vqa_accuracy(prediction, answers, script="2021") == pytest.approx(newest)
  assert 100 * va.vqa_accuracy(prediction, answers, script="2017") == pytest.approx(earlier)


def test_an_unknown_script_is_an_error():
  with pytest.raises(ValueError, match="'2019' is not one of 2021, 2017, own_data"):
    va.vqa_accuracy("yes", ["yes"], script="2019")
  with pytest.raises(ValueError, match="'2019'"):
    va.reference_answers(["yes"], "2019")
