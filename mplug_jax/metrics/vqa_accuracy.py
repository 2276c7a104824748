"""VQA answers: the official normalization and accuracy, exact match, soft labels, results file.

The accuracy is the one of the VQA challenge (Antol et al., "VQA: Visual Question Answering", 2015,
section 5, and the evaluation script of visualqa.org): an answer given by three of the other
annotators is fully right. The script's peculiarities are kept, because published numbers contain
them; comments name each. Only plain Python: strings in, floats out.
"""

import json
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from mplug_jax.runtime.atomic_files import write_atomic

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
  word: str(n)
  for n, word in enumerate(
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
  )
} | {"none": "0"}

# Correct spellings. An annotator's spelling may lack exactly one of the apostrophes.
_CONTRACTED = [
  "ain't",
  "aren't",
  "can't",
  "could've",
  "couldn't",
  "couldn't've",
  "didn't",
  "doesn't",
  "don't",
  "hadn't",
  "hadn't've",
  "hasn't",
  "haven't",
  "he'd",
  "he'd've",
  "he's",
  "how'd",
  "how'll",
  "how's",
  "isn't",
  "it'd",
  "it'd've",
  "it'll",
  "ma'am",
  "mightn't",
  "mightn't've",
  "might've",
  "mustn't",
  "must've",
  "needn't",
  "not've",
  "o'clock",
  "oughtn't",
  "'ow's'at",
  "shan't",
  "she'd've",
  "should've",
  "shouldn't",
  "shouldn't've",
  "somebody'd've",
  "somebody'll",
  "somebody's",
  "someone'd",
  "someone'd've",
  "someone'll",
  "someone's",
  "something'd",
  "something'd've",
  "something'll",
  "that's",
  "there'd",
  "there'd've",
  "there're",
  "there's",
  "they'd",
  "they'd've",
  "they'll",
  "they're",
  "they've",
  "'twas",
  "wasn't",
  "we'd've",
  "we've",
  "weren't",
  "what'll",
  "what're",
  "what's",
  "what've",
  "when's",
  "where'd",
  "where's",
  "where've",
  "who'd",
  "who'd've",
  "who'll",
  "who's",
  "who've",
  "why'll",
  "why're",
  "why's",
  "won't",
  "would've",
  "wouldn't",
  "wouldn't've",
  "y'all",
  "y'all'll",
  "y'all'd've",
  "you'd",
  "you'd've",
  "you'll",
  "you're",
  "you've",
]
_CONTRACTIONS = {
  word[: m.start()] + word[m.end() :]: word for word in _CONTRACTED for m in re.finditer("'", word)
}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the official table has this one the wrong way round

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # the official script passes re.UNICODE (= 32) as `count`


def strip_punctuation(text: str) -> str:
  """Applies the official punctuation stage; a period stays only before a digit.

  A mark is deleted if it is next to a space anywhere in the text, or if the text has a number such
  as "1,000"; otherwise it becomes a space ("red/white" -> "red white").

  Args:
    text: an answer.
  """
  has_number = _DIGIT_COMMA_DIGIT.search(text) is not None
  out = text
  for mark in _PUNCTUATION:
    deleted = has_number or f"{mark} " in text or f" {mark}" in text
    out = out.replace(mark, "" if deleted else " ")
  return _PERIOD.sub("", out, count=_MAX_PERIODS)


def normalize_words(text: str) -> str:
  """Applies the official word stage: lower case, digits, no articles, spelled-out contractions.

  Args:
    text: an answer.
  """
  words = (_NUMBERS.get(word, word) for word in text.lower().split())
  return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalize(answer: str) -> str:
  """Applies the full official normalization to a predicted answer.

  Args:
    answer: the prediction.
  """
  flat = answer.replace("\n", " ").replace("\t", " ").strip()
  return normalize_words(strip_punctuation(flat))


def reference_answers(answers: Sequence[str]) -> list[str]:
  """Returns the annotators' answers as the official script compares them.

  They lose punctuation only if they differ, and are never lower-cased: a unanimous "a cat" cannot
  be matched, because predictions lose their articles.

  Args:
    answers: answers of one question.
  """
  if len(set(answers)) > 1:
    return [strip_punctuation(answer) for answer in answers]
  return list(answers)


def vqa_accuracy(prediction: str, answers: Sequence[str], answer_ids: bool = True) -> float:
  """Returns the official VQA accuracy of one answer, in [0, 1].

  It is the mean over the annotators i of min(1, n_i / 3), with n_i the number of *other* annotators
  who gave the predicted answer.

  Args:
    prediction: the generated answer, not normalized.
    answers: the annotators' answers (ten in VQA v2), not normalized.
    answer_ids: True if each annotation has an `answer_id`. In the official script the others are
      the annotations that differ from annotation i; without ids, equal answers are equal
      annotations and are left out together.

  Raises:
    ValueError: there is no annotator's answer.
  """
  if not answers:
    raise ValueError(
      "vqa_accuracy: the list of annotators' answers is empty; a question without "
      "answers (a test split) has no accuracy, write a results file instead."
    )
  predicted = normalize(prediction)
  truths = reference_answers(answers)
  matches = truths.count(predicted)
  total = 0.0
  for truth in truths:
    left_out = truth == predicted
    others = matches - left_out if answer_ids else matches * (not left_out)
    total += min(1.0, others / 3)
  return total / len(truths)


def mean_by_group(
  scores: Mapping[Hashable, float], groups: Mapping[Hashable, str]
) -> dict[str, float]:
  """Returns the mean score of each group, such as the accuracy of each question type.

  Args:
    scores: question id -> score.
    groups: question id -> name of its group, for every question id of `scores`.

  Raises:
    ValueError: a question has no group.
  """
  members: dict[str, list[float]] = {}
  for question_id, score in scores.items():
    if question_id not in groups:
      raise ValueError(f"mean_by_group: question {question_id!r} has no group.")
    members.setdefault(groups[question_id], []).append(score)
  return {name: sum(values) / len(values) for name, values in members.items()}


def soft_label_score(prediction: str, label: Mapping[str, float]) -> float:
  """Returns the weight of the prediction in the label, the official validation metric.

  The lookup is literal, as in the official code, so an answer in which detokenization put spaces
  ("10 : 30") scores 0 (docs/official.md item 33).

  Args:
    prediction: the generated answer.
    label: {answer: weight}.
  """
  return float(label.get(prediction, 0.0))


def exact_match(prediction: str, truth: str) -> bool:
  """Compares answers for data with a single right answer.

  Case, repeated spaces and spaces around punctuation do not count, because a WordPiece tokenizer
  loses them ("t - shirt" is "t-shirt", docs/official.md item 33). Articles and numbers do count.

  Args:
    prediction: the generated answer.
    truth: the right answer.
  """
  return _without_spacing(prediction) == _without_spacing(truth)


def _without_spacing(text: str) -> str:
  words = " ".join(text.lower().split())
  return re.sub(r" ?([^\w\s]) ?", r"\1", words)


def results_rows(
  question_ids: Sequence[int | str], answers: Sequence[str]
) -> list[dict[str, int | str]]:
  """Returns rows in the VQA server's format, one per question, ordered by question id.

  Integer ids are written as integers (7, "7", np.int64(7)); other ids, which only user data has,
  stay strings and come last.

  Args:
    question_ids: id of each question.
    answers: answer to each question.

  Returns:
    [{"question_id": int, "answer": str}, ...]

  Raises:
    ValueError: lengths differ, or one question got two different answers.
  """
  if len(question_ids) != len(answers):
    raise ValueError(f"results_rows: {len(question_ids)} question ids but {len(answers)} answers.")
  by_id: dict[int | str, str] = {}
  for raw_id, answer in zip(question_ids, answers, strict=True):
    question_id = _as_integer(raw_id)
    if by_id.setdefault(question_id, answer) != answer:
      raise ValueError(
        f"results_rows: question {question_id!r} has two different answers, "
        f"{by_id[question_id]!r} and {answer!r}; question ids must be unique."
      )
  ordered = sorted(by_id, key=lambda i: (isinstance(i, str), i))
  return [{"question_id": i, "answer": by_id[i]} for i in ordered]


def _as_integer(question_id: int | str) -> int | str:
  if isinstance(question_id, (int, np.integer)):
    return int(question_id)
  text = str(question_id)
  # "007" stays a string: as 7 it could collide with another question.
  return int(text) if re.fullmatch(r"0|-?[1-9][0-9]*", text) else text


def write_results(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes the JSON file of the VQA server, atomically.

  Args:
    path: the file.
    rows: as `results_rows` returns them.
  """
  write_atomic(path, json.dumps(list(rows), ensure_ascii=False).encode())
