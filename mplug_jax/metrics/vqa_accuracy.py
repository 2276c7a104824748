"""VQA answers: the official normalization and accuracy, exact match, soft labels, results file.

The accuracy is the one of the VQA challenge (Antol et al., "VQA: Visual Question Answering", 2015,
section 5, and the evaluation script of visualqa.org): an answer given by three of the other
annotators is fully right. The script's peculiarities are kept, because published numbers contain
them; comments name each. There are two scripts, see SCRIPTS and docs/official.md item 62. Only
plain Python: strings in, floats out.
"""

import json
import os
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from mplug_jax.metrics import ids
from mplug_jax.runtime.atomic_files import write_atomic

# "2021" is the present script (GT-Vision-Lab/VQA a013f00), "2017" the one that mPLUG copied.
SCRIPTS = ("2021", "2017")
OWN_DATA = "own_data"  # comparison of answers that are not the benchmark's

_ENOUGH = 3  # other annotators who make an answer fully right
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
  """Applies the full official normalization to an answer.

  Args:
    answer: a prediction or an annotator's answer.
  """
  return normalize_words(strip_punctuation(_on_one_line(answer)))


def _on_one_line(answer: str) -> str:
  return answer.replace("\n", " ").replace("\t", " ").strip()


def normalize_own(answer: str) -> str:
  """Normalizes a prediction or a right answer of data that are not the benchmark's.

  This is the full normalization without regard to spaces around punctuation, as in `exact_match`.
  Of an answer that it empties, such as the letter "A" or the sign "+", as much is kept as needed.

  Args:
    answer: the answer.
  """
  text = without_spacing(answer)
  return normalize(text) or strip_punctuation(text).strip() or text


def comparison(answers: Sequence[str], script: str = "2021") -> Callable[[str], str]:
  """Returns the function that a prediction passes before it is compared with `reference_answers`.

  Args:
    answers: answers of one question.
    script: a member of SCRIPTS, or OWN_DATA.

  Raises:
    ValueError: the script is unknown.
  """
  if script == OWN_DATA:
    return normalize_own
  if script not in SCRIPTS:
    raise ValueError(f"VQA script {script!r} is not one of {', '.join((*SCRIPTS, OWN_DATA))}.")
  return normalize if script == "2017" or _differ(answers) else _on_one_line


def _differ(answers: Sequence[str]) -> bool:
  return len(set(map(_on_one_line, answers))) > 1


def reference_answers(answers: Sequence[str], script: str = "2021") -> list[str]:
  """Returns the annotators' answers as they are compared.

  Script "2021": answers that differ are normalized like the prediction; if all are the same, they
  and the prediction are compared literally ("Black." is not "black"). Script "2017": answers lose
  punctuation if they differ, and are never lower-cased; a unanimous "a cat" cannot be matched,
  because predictions lose their articles. OWN_DATA: as `normalize_own`, without blank answers.

  Args:
    answers: answers of one question.
    script: a member of SCRIPTS, or OWN_DATA.

  Raises:
    ValueError: the script is unknown.
  """
  compared = comparison(answers, script)
  if script == OWN_DATA:
    return [compared(answer) for answer in answers if answer.strip()]
  if script == "2017":
    return [strip_punctuation(a) for a in answers] if len(set(answers)) > 1 else list(answers)
  return [compared(answer) for answer in answers]


def vqa_accuracy(
  prediction: str, answers: Sequence[str], answer_ids: bool = True, script: str = "2021"
) -> float:
  """Returns the VQA accuracy of one answer, in [0, 1].

  It is the mean over the annotators i of min(1, n_i / 3), with n_i the number of *other* annotators
  who gave the predicted answer. With OWN_DATA and fewer than four answers, an answer of all the
  others is fully right, so that the best answer to a question without disagreement scores 1.

  Args:
    prediction: the generated answer, not normalized.
    answers: the annotators' answers (ten in VQA v2), not normalized.
    answer_ids: True if each annotation has an `answer_id`. In the official script the others are
      the annotations that differ from annotation i; without ids, equal answers are equal
      annotations and are left out together.
    script: a member of SCRIPTS, or OWN_DATA.

  Raises:
    ValueError: there is no annotator's answer, or the script is unknown.
  """
  truths = reference_answers(answers, script)
  if not truths:
    raise ValueError(
      "vqa_accuracy: the list of annotators' answers is empty; a question without "
      "answers (a test split) has no accuracy, write a results file instead."
    )
  predicted = comparison(answers, script)(prediction)
  matches = truths.count(predicted)
  enough = _ENOUGH
  if script == OWN_DATA:
    if len(truths) == 1:
      return float(matches)
    enough = min(_ENOUGH, len(truths) - 1)
  total = 0.0
  for truth in truths:
    left_out = truth == predicted
    others = matches - left_out if answer_ids else matches * (not left_out)
    total += min(1.0, others / enough)
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
  return without_spacing(prediction) == without_spacing(truth)


def without_spacing(text: str) -> str:
  """Returns a text as `exact_match` compares it.

  Args:
    text: an answer.
  """
  words = " ".join(text.lower().split())
  return re.sub(r" ?([^\w\s]) ?", r"\1", words)


def results_rows(
  question_ids: Sequence[int | str], answers: Sequence[str]
) -> list[dict[str, int | str]]:
  """Returns rows in the VQA server's format, one per question, ordered by question id.

  Integer ids are written as integers (7, "7", 7.0, np.int64(7)); other ids, which only user data
  has, stay strings and come last.

  Args:
    question_ids: id of each question.
    answers: answer to each question.

  Returns:
    [{"question_id": int, "answer": str}, ...]

  Raises:
    ValueError: lengths differ, or two questions have the same id.
  """
  if len(question_ids) != len(answers):
    raise ValueError(f"results_rows: {len(question_ids)} question ids but {len(answers)} answers.")
  by_id: dict[int | str, str] = {}
  for raw_id, answer in zip(question_ids, answers, strict=True):
    question_id = ids.canonical(raw_id)
    if question_id in by_id:
      raise ValueError(
        f"results_rows: question_id {question_id!r} occurs twice, with the answers "
        f"{by_id[question_id]!r} and {answer!r}; question ids must be unique."
      )
    by_id[question_id] = answer
  ordered = sorted(by_id, key=lambda i: (isinstance(i, str), i))
  return [{"question_id": i, "answer": by_id[i]} for i in ordered]


def write_results(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes the JSON file of the VQA server, atomically.

  Args:
    path: the file.
    rows: as `results_rows` returns them.
  """
  write_atomic(path, json.dumps(list(rows), ensure_ascii=False).encode())
