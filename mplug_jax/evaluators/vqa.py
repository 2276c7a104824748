"""Evaluates visual question answering on every question of a split."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging

from mplug_jax.data.examples import vqa, vqa_answers
from mplug_jax.data.sources import vqa as sources
from mplug_jax.data.sources.chunked import Chunked
from mplug_jax.data.sources.entry_ids import EntryIds
from mplug_jax.evaluators import common
from mplug_jax.evaluators.common import Predict
from mplug_jax.metrics import vqa_accuracy, vqa_scoring
from mplug_jax.reporting import sample_sheet

SHEET_QUESTIONS = 4
_GENERATED = ("scenes", "clips")  # Their answers are made of words that the model knows.


class VqaEvaluator:
  """Answers and scores all questions of a split; writes predictions and a sample sheet."""

  metric = "accuracy"  # Printed last, and decides which checkpoint is best.

  def __init__(self, config: Any, tokenizer: Any, workdir: str):
    """Opens the split.

    Args:
      config: config of the run.
      tokenizer: tokenizer of the run.
      workdir: folder to write results to.
    """
    self.config = config
    self.tokenizer = tokenizer
    self.workdir = workdir
    data = config.data
    self.source: Any = Chunked(
      sources.get(data, config.eval.split), data.questions_per_image, "questions"
    )
    self.transform = vqa.make_transform(config, tokenizer, train=False)
    self._candidates = vqa_answers.candidate_answers(config, tokenizer)
    self._scoring = vqa_answers.scoring(config, config.eval.split)
    self._notes = self._unscorable()
    self.samples: list[str] = []  # Sample predictions of the last run.

  def _unscorable(self) -> list[str]:
    """Logs and returns sentences about questions that no prediction can match.

    Raises:
      ValueError: two questions have the same id.
    """
    if self.config.data.name in _GENERATED:
      return []
    split = self.config.eval.split
    limit = self.config.eval.limit
    if split == "train":  # whose ids are not checked when they are read
      ids = EntryIds("question_id", "evaluated")
      for number, question in enumerate(vqa_answers.evaluated_questions(self.source, limit), 1):
        ids.add(question["question_id"], f"train split, question {number}")
    questions = vqa_answers.evaluated_questions(self.source, limit)
    notes = vqa_answers.unscorable(self.config, split, questions, self.tokenizer)
    for sentence in notes:
      logging.warning("%s split: %s", split, sentence)
    return notes

  def run(
    self, predict: Predict, process_index: int = 0, process_count: int = 1
  ) -> dict[str, float]:
    """Evaluates.

    Args:
      predict: {name: function from a batch of this process to {name: array with the rows of all
        processes}}, which include "index", "mask" and "corrupt" of the batch.
      process_index: number of this process.
      process_count: number of processes.

    Returns:
      {name: percent}: accuracy, accuracy per group of questions, and the share of the most frequent
      answer; none of these for questions without answers or with blank ones. `corrupt_images`, if
      any, is the number of unreadable images; their questions are answered without them and count.
    """
    answers, corrupt = self._predict(predict, process_index, process_count)
    self.samples = [
      f"{q['question']} -> {text}"
      + (f"   (truth: {_first_answer(q)})" if vqa_scoring.has_answer(q) else "")
      for q, text in common.spread(answers)
    ] + self._notes
    if process_index == 0:
      rows = [(q["question_id"], text) for q, text in answers]
      vqa_accuracy.write_results(
        os.path.join(self.workdir, "predictions.json"), vqa_accuracy.results_rows(*zip(*rows))
      )
      self._write_sheet(answers)
    score = self._scoring.score
    scored = [(q, score(text, q)) for q, text in answers if vqa_scoring.has_answer(q)]
    self.samples += common.unscored_note(len(scored), len(answers), "questions", "answer")
    notes: dict[str, float] = {"corrupt_images": len(corrupt)} if corrupt else {}
    if not scored:
      return notes
    result = {"accuracy": 100 * float(np.mean([s for _, s in scored]))}
    groups = {q["question_id"]: q["family"] for q, _ in scored if q.get("family")}
    scores = {q["question_id"]: s for q, s in scored if q["question_id"] in groups}
    for name, value in sorted(vqa_accuracy.mean_by_group(scores, groups).items()):
      result[f"accuracy_{name}"] = 100 * value
    most, _ = Counter(_first_answer(q) for q, _ in scored).most_common(1)[0]
    return (
      result
      | {"majority_answer": 100 * float(np.mean([score(most, q) for q, _ in scored]))}
      | notes
    )

  def _predict(
    self, predict: Predict, process_index: int, process_count: int
  ) -> tuple[list[tuple[dict[str, Any], str]], set]:
    """Returns [(question record, answer)] of the split in order, and ids of unreadable images."""
    answers = []
    corrupt = set()
    for index, out, unreadable in common.rows(
      self.config,
      self.source,
      self.transform,
      predict[self.config.task.predict],
      process_index,
      process_count,
    ):
      answers += [(q, self._text(out, i)) for i, q in enumerate(self.source.questions(index))]
      if unreadable:
        corrupt.add(self.source[index]["image_id"])
    return answers, corrupt

  def _text(self, out: dict[str, Any], i: int) -> str:
    """Returns the answer to question i of a row: generated tokens, or the best candidate."""
    if "tokens" in out:
      return self.tokenizer.decode(out["tokens"][i, : out["length"][i]])
    return self._candidates[int(out["answer"][i, 0])]

  def _write_sheet(self, answers: list[tuple[dict[str, Any], str]]) -> None:
    """Writes predictions.png: the first images with some of their questions and answers."""
    texts = {q["question_id"]: text for q, text in answers}
    common.write_sheet(
      os.path.join(self.workdir, "predictions.png"),
      self._shown(texts),
      self.config.model.image_size,
      self.config.data.frames,
    )

  def _shown(self, texts: dict[Any, str]) -> Iterator[tuple[Any, list[sample_sheet.Sample]]]:
    """Yields each image whose questions are in {question_id: answer}, with samples."""
    seen = set()
    for index in range(len(self.source)):
      record = self.source[index]
      questions = [q for q in record["questions"] if q["question_id"] in texts][:SHEET_QUESTIONS]
      if not questions:
        return
      if record["image_id"] not in seen:
        seen.add(record["image_id"])
        yield (
          record["image"],
          [
            sample_sheet.Sample(q["question"], texts[q["question_id"]], _first_answer(q))
            for q in questions
          ],
        )


def _first_answer(question: dict[str, Any]) -> str:
  """Returns the first answer that is not blank, or ""."""
  return next((answer for answer in question["answers"] if answer.strip()), "")
