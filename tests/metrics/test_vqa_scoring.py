"""Rules by which an answer is scored: the benchmark's script, own data, soft labels, one answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug_jax.metrics import vqa_accuracy
from mplug_jax.metrics.vqa_scoring import Scoring, has_answer

OWN = Scoring()
BENCHMARK = Scoring(benchmark=True)


def question(answers, dataset="vqa", weights=None):
  return {"answers": answers, "dataset": dataset, "weights": weights}


@pytest.mark.parametrize(
  ("prediction", "answers", "score"),
  [
    ("paris", ["Paris"] * 3, 1),
    ("Paris.", ["Paris"] * 2, 1),
    ("london", ["Paris"] * 3, 0),
    ("paris", ["Paris"] * 10, 1),
    ("paris", ["Paris", "London"], 0.5),
    ("paris", ["Paris", "paris", "London"], 2 / 3),
    ("paris", ["Paris"] * 3 + ["London"] * 7, 0.9),  # as the benchmark counts
    ("two", ["2", "2", "two"], 1),
    ("t - shirt", ["T-shirt"] * 3, 1),  # spaces of a WordPiece tokenizer
    ("10 : 30", ["10:30"] * 3, 1),
    ("don ' t", ["don't"] * 3, 1),
    ("a", ["A"] * 3, 1),
    ("the", ["A"] * 3, 0),
    ("", ["A"] * 3, 0),
    ("+", ["+"] * 3, 1),
    ("-", ["+"] * 3, 0),
    ("paris", ["Paris", "", " "], 1),  # blank answers are none
    ("a cat", ["The cat"] * 4, 1),
  ],
)
def test_own_data_compares_normalized_with_normalized(prediction, answers, score):
  assert OWN.score(prediction, question(answers)) == pytest.approx(score)


def test_the_script_is_that_of_benchmark_questions_alone():
  answers = ["Paris"] * 10
  assert OWN.score("paris", question(answers)) == 1
  assert BENCHMARK.score("paris", question(answers)) == 0
  assert BENCHMARK.score("Paris", question(answers)) == 1
  assert BENCHMARK._replace(script="2017").score("Paris", question(answers)) == 0
  weights = [0.5]
  assert BENCHMARK.score("paris", question(answers, "vg", weights)) == 1


def test_one_answer_and_soft_labels():
  assert OWN.score("Hot  Dog", question(["hot dog"])) == 1
  assert OWN.score("two", question(["2"])) == 0
  soft = BENCHMARK._replace(soft_labels=True)
  assert soft.score("pink", question(["red", "pink"], weights=[1.0, 0.3])) == pytest.approx(0.3)
  assert soft.score("Pink", question(["red", "pink"], weights=[1.0, 0.3])) == 0


def test_questions_with_blank_answers_alone_have_none():
  assert has_answer(question(["", "yes"]))
  assert not has_answer(question([" ", "\t"]))
  assert not has_answer(question([]))


TEXTS = st.sampled_from(
  ["Paris", "paris.", "two", "2", "a", "the", "A cat", "t-shirt", "t - shirt", "+", "", " ", "it's"]
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(TEXTS, min_size=1, max_size=10), TEXTS, st.sampled_from(["own", "2021", "2017"]))
def test_matching_names_exactly_the_predictions_that_score(answers, prediction, script):
  rules = OWN if script == "own" else Scoring(script, benchmark=True)
  asked = question(answers)
  if not has_answer(asked):
    return
  form, matching = rules.matching(asked)
  score = rules.score(prediction, asked)
  assert 0 <= score <= 1
  assert (form(prediction) in matching) == (score > 0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.integers(2, 12))
def test_own_data_without_disagreement_scores_its_answer_fully(answer, times):
  if answer.strip():
    assert OWN.score(answer, question([answer] * times)) == 1
    assert vqa_accuracy.vqa_accuracy(answer.strip(), [answer] * max(times, 4)) == 1
