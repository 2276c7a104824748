"""Score of an answer to a question, by the rule of the question's data."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from mplug_jax.metrics import vqa_accuracy


def has_answer(question: Mapping[str, Any]) -> bool:
  """Returns whether a question has an answer that is not blank; others are not scored.

  Args:
    question: record with "answers".
  """
  return any(answer.strip() for answer in question["answers"])


class Scoring(NamedTuple):
  """Rules by which the answers of a split are scored.

  A question with a single answer is scored by exact match, one with a soft label by the weight of
  the prediction, any other by VQA accuracy.

  Attributes:
    script: of questions of the benchmark: a member of vqa_accuracy.SCRIPTS.
    benchmark: the questions of dataset "vqa" are those of the benchmark; otherwise all are
      compared as vqa_accuracy.OWN_DATA.
    soft_labels: the weights of the questions are soft labels.
  """

  script: str = "2021"
  benchmark: bool = False
  soft_labels: bool = False

  def script_of(self, question: Mapping[str, Any]) -> str:
    """Returns the script that compares the answers of a question."""
    benchmark = self.benchmark and question.get("dataset", "vqa") == "vqa"
    return self.script if benchmark else vqa_accuracy.OWN_DATA

  def score(self, prediction: str, question: Mapping[str, Any]) -> float:
    """Scores a predicted answer.

    Args:
      prediction: the answer.
      question: record with "answers", which are not all blank, "weights" and "dataset".

    Returns:
      0 to 1.
    """
    answers = question["answers"]
    if len(answers) == 1:
      return float(vqa_accuracy.exact_match(prediction, answers[0]))
    if self.soft_labels:
      return vqa_accuracy.soft_label_score(
        prediction, dict(zip(dict.fromkeys(answers), question["weights"]))
      )
    return vqa_accuracy.vqa_accuracy(prediction, answers, script=self.script_of(question))

  def matching(self, question: Mapping[str, Any]) -> tuple[Callable[[str], str], Collection[str]]:
    """Returns a function of predictions, and its values for predictions that score above 0.

    Args:
      question: as in `score`.
    """
    answers = question["answers"]
    if len(answers) == 1:
      return vqa_accuracy.without_spacing, {vqa_accuracy.without_spacing(answers[0])}
    if self.soft_labels:
      weights = zip(dict.fromkeys(answers), question["weights"])
      return str, {answer for answer, weight in weights if weight > 0}
    script = self.script_of(question)
    return (
      vqa_accuracy.comparison(answers, script),
      set(vqa_accuracy.reference_answers(answers, script)),
    )
