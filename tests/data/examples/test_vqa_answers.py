"""Candidate answers, and questions that count as wrong whatever the model is."""

import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug_jax.data.errors import RecordError
from mplug_jax.data.examples import vqa_answers
from mplug_jax.data.text import wordpiece
from tests.support import tiny_run, word_list

WORDS = ("yes", "no", "dog", "two", "a", "red", "car", "##s", "-", "t", "shirt", ".", "'", "paris")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
  path.write_text(word_list.text(*WORDS))
  return wordpiece.WordPieceTokenizer(path)


def config(candidates=(), data="jsonl", **changes):
  arg = f"tiny,data={data},root=nowhere"
  settings = {"task__rank_answers": tuple(candidates), "task__max_length": 3} | changes
  return tiny_run.config(arg, **({"task__predict": "rank"} if candidates else {}), **settings)


def question(number, *answers, **more):
  return {"question_id": number, "answers": list(answers), "weights": None, "dataset": "vqa"} | more


# ---- candidates


def test_candidates_are_used_once_and_in_order(tokenizer, caplog):
  given_answers = ["dog", " ", "yes", "Dog", "yes", "\x00", "red " * 70, "cars", "no"]
  with caplog.at_level(logging.WARNING):
    kept = vqa_answers.candidate_answers(config(given_answers), tokenizer)
  assert kept == ("dog", "yes", "cars", "no")
  sentences = [record.getMessage() for record in caplog.records]
  assert [sentence.partition(": ")[0] for sentence in sentences] == [
    f"config.task.rank_answers, entry {i}" for i in (2, 4, 5, 6, 7)
  ]
  assert "is blank. It is left out." in sentences[0]
  assert "'Dog' has the same tokens as entry 1, 'dog'" in sentences[1]
  assert "'yes' repeats entry 3, 'yes'" in sentences[2]
  assert "has no token" in sentences[3]
  assert (
    "has 72 tokens with [CLS] and [SEP], more than config.model.max_positions=64" in sentences[4]
  )


def test_candidates_that_are_longer_than_trained_answers_are_kept_and_named(tokenizer, caplog):
  c = config(["yes", "two red dog cars", "no"], data__max_answer_tokens=5, data__strict=True)
  with caplog.at_level(logging.WARNING):
    assert vqa_answers.candidate_answers(c, tokenizer) == ("yes", "two red dog cars", "no")
  (record,) = caplog.records
  assert "1 of 3 candidate answers have more tokens" in record.getMessage()
  assert record.getMessage().endswith("entry 2 ('two red dog cars').")


def test_a_list_in_a_file_names_the_file(tokenizer, tmp_path, caplog):
  path = tmp_path / "answers.json"
  path.write_text(json.dumps(["yes", "", "no"]))
  c = config(task__predict="rank", data__answer_list=str(path))
  with caplog.at_level(logging.WARNING):
    assert vqa_answers.candidate_answers(c, tokenizer) == ("yes", "no")
  assert f"{path}, entry 2: the candidate answer is blank." in caplog.text
  c.data.strict = True
  with pytest.raises(RecordError, match="answers.json, entry 2: the candidate answer is blank"):
    vqa_answers.candidate_answers(c, tokenizer)


def test_a_list_without_a_usable_answer_is_an_error(tokenizer, tmp_path):
  path = tmp_path / "answers.json"
  c = config(task__predict="rank", data__answer_list=str(path))
  for content in ([], {}):
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="answers.json is an empty list"):
      vqa_answers.candidate_answers(c, tokenizer)
  path.write_text(json.dumps(["", "  "]))
  with pytest.raises(ValueError, match="answers.json holds no candidate answer"):
    vqa_answers.candidate_answers(c, tokenizer)
  c = config(["yes", 3])
  with pytest.raises(ValueError, match="must be a list of texts"):
    vqa_answers.candidate_answers(c, tokenizer)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
  st.lists(
    st.sampled_from(["yes", "Yes", "no", "", " ", "\t", "red car", "red  car", "\x00", "dog"]),
    min_size=1,
    max_size=10,  # as many as the log names
  )
)
def test_every_candidate_is_kept_or_named(tokenizer, entries):
  vqa_answers._usable.cache_clear()
  named = []
  handler = logging.Handler()
  handler.emit = lambda record: named.append(record.getMessage())
  logger = logging.getLogger("absl")
  logger.addHandler(handler)
  try:
    # One entry is always usable.
    kept = vqa_answers.candidate_answers(config([*entries, "two"]), tokenizer)
  finally:
    logger.removeHandler(handler)
  left_out = {int(sentence.partition(", entry ")[2].partition(":")[0]) for sentence in named}
  assert list(kept) == [e for i, e in enumerate([*entries, "two"], 1) if i not in left_out]
  rows = [tuple(tokenizer.encode(answer)) for answer in kept]
  assert len(set(rows)) == len(rows)
  assert all(len(row) > 1 for row in rows)


# ---- truths


def test_own_data_that_can_be_answered_give_no_sentence(tokenizer):
  questions = [
    question(0, "Paris", "Paris", "Paris"),
    question(1, "T-shirt", "T-shirt"),
    question(2, "a", "a"),
    question(3, "yes"),
    question(4),  # unknown
  ]
  assert vqa_answers.unscorable(config(task__max_length=8), "val", questions, tokenizer) == []


def test_blank_long_and_unwritable_truths_are_named(tokenizer):
  questions = [
    question(7, " "),
    question(8, "", ""),
    question(9, "red dog two cars"),
    question(10, "Zürich", "Zürich"),  # no piece of the vocabulary
    question(11, "yes"),
  ]
  blank, unmatched = vqa_answers.unscorable(config(), "val", questions, tokenizer)
  assert blank == "2 of 5 questions have only blank answers and are not scored: question_id 7, 8."
  assert unmatched == (
    "2 of 5 questions can never be answered right, because none of their answers is matched by the "
    "text that the tokenizer makes of it with config.task.max_length=3: question_id 9 "
    "('red dog two cars'), 10 ('Zürich')."
  )


def test_only_the_first_ten_are_named(tokenizer):
  questions = [question(i, "red dog two cars") for i in range(30)]
  (sentence,) = vqa_answers.unscorable(config(), "val", questions, tokenizer)
  assert sentence.startswith("30 of 30 questions")
  assert sentence.endswith("9 ('red dog two cars'), ....")


def test_truths_that_are_no_candidates_are_named(tokenizer):
  questions = [question(1, "Yes"), question(2, "dog"), question(3, "dog", "dog", "No")]
  (sentence,) = vqa_answers.unscorable(config(["yes", "no"]), "val", questions, tokenizer)
  assert sentence == (
    "1 of 3 questions can never be answered right, because none of their answers is among the 2 "
    "candidates: question_id 2 ('dog')."
  )


def test_the_benchmark_has_truths_that_its_scripts_never_match(tokenizer):
  questions = [question(1, *["Paris"] * 10), question(2, *["a"] * 10), question(3, *["yes"] * 10)]
  c = config(data="vqa_v2")
  (sentence,) = vqa_answers.unscorable(c, "val", questions, tokenizer)
  assert sentence.endswith(": question_id 1 ('Paris').")
  c.eval.vqa_script = "2017"
  (sentence,) = vqa_answers.unscorable(c, "val", questions, tokenizer)
  assert sentence.endswith(": question_id 1 ('Paris'), 2 ('a').")
  # Without a tokenizer, answers are taken as they are.
  (sentence,) = vqa_answers.unscorable(c, "val", questions)
  assert "the comparison changes predictions" in sentence


def test_scoring_follows_the_source():
  assert vqa_answers.scoring(config(), "val").script_of(question(1)) == "own_data"
  c = config(data="vqa_v2")
  assert c.eval.vqa_script == "2021"
  rules = vqa_answers.scoring(c, "val")
  assert rules.script_of(question(1)) == "2021"
  assert rules.script_of(question(1, dataset="vg")) == "own_data"
  assert not rules.soft_labels
  c.eval.vqa_script = "2017"
  c.data.label_file = "labels.json"
  assert vqa_answers.scoring(c, "val").script_of(question(1)) == "2017"
  assert vqa_answers.scoring(c, "val").soft_labels
  assert not vqa_answers.scoring(c, "test").soft_labels
