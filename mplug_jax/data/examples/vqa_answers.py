"""Answers of VQA data: their score, answers that cannot be matched, candidates of ranking."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from mplug_jax.config import Config
from mplug_jax.data.errors import NAMED, BadRecords, RecordError
from mplug_jax.data.sources import vqa
from mplug_jax.data.text.tokenizer_base import Tokenizer
from mplug_jax.metrics import vqa_scoring

_BENCHMARK = "vqa_v2"  # config.data.name of the benchmark's own files


def scoring(config: Config, split: str) -> vqa_scoring.Scoring:
  """Returns the rules by which the answers of a split are scored.

  The benchmark's script, config.eval.vqa_script, is that of source vqa_v2 alone.

  Args:
    config: config of the run.
    split: "train", "val" or "test".
  """
  benchmark = config.data.name == _BENCHMARK
  return vqa_scoring.Scoring(
    script=config.eval.get("vqa_script", "2021"),
    benchmark=benchmark,
    soft_labels=split == "val" and bool(config.data.get("label_file")),
  )


def unscorable(
  config: Config,
  split: str,
  questions: Iterable[Mapping[str, Any]],
  tokenizer: Tokenizer | None = None,
) -> list[str]:
  """Describes questions that count as wrong whatever the model is, or do not count.

  Args:
    config: config of the run.
    split: "train", "val" or "test".
    questions: questions of that split.
    tokenizer: tokenizer of the run; None: every answer can be written.

  Returns:
    A sentence for questions with only blank answers, and one for questions of which no answer can
    be matched: the model cannot write it, or the comparison changes it.
  """
  rules = scoring(config, split)
  attempts = _Attempts(config, tokenizer)
  total = 0
  blank: list[str] = []
  unmatched: list[str] = []
  for question in questions:
    total += 1
    if not question["answers"]:
      continue
    if not vqa_scoring.has_answer(question):
      blank.append(str(question["question_id"]))
      continue
    form, matching = rules.matching(question)
    if not attempts.any_in(form, matching, question["answers"]):
      first = next(answer for answer in question["answers"] if answer.strip())
      unmatched.append(f"{question['question_id']} ({first!r})")
  sentences = []
  if blank:
    sentences.append(
      f"{len(blank)} of {total} questions have only blank answers and are not scored: "
      f"question_id {_first(blank)}."
    )
  if unmatched:
    sentences.append(
      f"{len(unmatched)} of {total} questions can never be answered right, because "
      f"{attempts.reason}: question_id {_first(unmatched)}."
    )
  return sentences


def _first(names: Sequence[str]) -> str:
  return ", ".join((*names[:NAMED], *(["..."] if len(names) > NAMED else [])))


class _Attempts:
  """Predictions that a model can make at a question.

  Attributes:
    reason: says why none of them matches.
  """

  def __init__(self, config: Config, tokenizer: Tokenizer | None):
    task = config.task
    self._candidates = candidate_answers(config, tokenizer) if task.predict == "rank" else ()
    self._forms: dict[Callable[[str], str], set[str]] = {}
    self._tokenizer = tokenizer
    self._lengths = (task.min_length, task.max_length)
    if self._candidates:
      self.reason = f"none of their answers is among the {len(self._candidates)} candidates"
    elif tokenizer is None:
      self.reason = "the comparison changes predictions so that they match none of their answers"
    else:
      self.reason = (
        "none of their answers is matched by the text that the tokenizer makes of it with "
        f"config.task.max_length={task.max_length}"
      )
    self._written = functools.lru_cache(1 << 16)(self._write)

  def any_in(
    self, form: Callable[[str], str], matching: Iterable[str], answers: Iterable[str]
  ) -> bool:
    """Returns whether a prediction matches.

    Args:
      form: function that a prediction passes before the comparison.
      matching: its values for predictions that match.
      answers: right answers, which the model is supposed to give.
    """
    if self._candidates:
      if form not in self._forms:
        self._forms[form] = set(map(form, self._candidates))
      return not self._forms[form].isdisjoint(matching)
    texts = (self._written(answer) for answer in dict.fromkeys(answers))
    return any(text is not None and form(text) in matching for text in texts)

  def _write(self, answer: str) -> str | None:
    """Returns the text that a model generates for an answer; None if it is too short."""
    if self._tokenizer is None:
      return answer
    ids = pieces(self._tokenizer, answer)
    least, most = self._lengths
    return self._tokenizer.decode(ids[:most]) if len(ids) >= least else None


def pieces(tokenizer: Tokenizer, text: str) -> list[int]:
  """Returns the token ids of a text without [bos] and [eos].

  Args:
    tokenizer: tokenizer of the run.
    text: the text.
  """
  return [i for i in tokenizer.encode(text) if i not in (tokenizer.bos_id, tokenizer.eos_id)]


def evaluated_questions(source: Any, limit: int = 0) -> Iterator[Mapping[str, Any]]:
  """Yields the questions of a source.

  Args:
    source: source of VQA records.
    limit: number of records, from the first; 0: all.
  """
  for index in range(min(limit or len(source), len(source))):
    yield from vqa.questions_of(source, index)


def candidate_answers(config: Config, tokenizer: Tokenizer | None = None) -> tuple[str, ...]:
  """Returns the answers to choose from; () if answers are generated.

  These are config.task.rank_answers, or with config.task.predict=rank and without them the list in
  config.data.answer_list. Blank entries, repeated ones and those that the model cannot score are
  left out and named in the log; entries that exceed config.data.max_answer_tokens are named.

  Args:
    config: config of the run.
    tokenizer: tokenizer of the run; None: tokens are not looked at.

  Raises:
    ValueError: config.task.predict is unknown, there are no answers to choose from, or one cannot
      be used and config.data.strict is set.
    FileNotFoundError: the list does not exist.
  """
  known = ("generate", "rank")
  given = config.task.rank_answers
  if config.task.predict not in known:
    raise ValueError(
      f"config.task.predict={config.task.predict!r} is not one of {', '.join(known)}."
    )
  origin = "config.task.rank_answers"
  if isinstance(given, str) or not all(isinstance(answer, str) for answer in given):
    raise ValueError(f"{origin}={given!r} must be a list of texts, the candidate answers.")
  if not given and config.task.predict == "generate":
    return ()
  if not given:
    if not config.data.get("answer_list"):
      raise ValueError(
        "config.task.predict=rank chooses from config.task.rank_answers, or from the JSON list "
        "config.data.answer_list of a source of files; set one of them."
      )
    origin = config.data.answer_list
    given = vqa.answer_list(config.data)
  return _usable(
    tuple(given),
    str(origin),
    tokenizer,
    config.model.max_positions,
    config.data.get("max_answer_tokens", config.model.max_positions),
    bool(config.data.get("strict", False)),
  )


@functools.lru_cache(4)  # task and evaluator ask for the same list, which is logged once
def _usable(
  answers: tuple[str, ...],
  origin: str,
  tokenizer: Tokenizer | None,
  max_positions: int,
  max_trained: int,
  strict: bool,
) -> tuple[str, ...]:
  """Returns the candidates that a model can choose, each once.

  Args:
    answers: the list.
    origin: its file or config key, for messages.
    tokenizer: tokenizer of the run, if tokens are to be looked at.
    max_positions: tokens that the model can read, with [bos] and [eos].
    max_trained: tokens to which training cuts answers.
    strict: raise an error instead of leaving anything out.
  """
  bad = BadRecords(strict)
  numbers: dict[Any, int] = {}
  kept = []
  long = []
  for number, answer in enumerate(answers, 1):
    ids = answer if tokenizer is None else tuple(pieces(tokenizer, answer))
    length = 0 if tokenizer is None else len(ids) + 2  # with [CLS] and [SEP]
    problem = ""
    if not answer.strip():
      problem = "the candidate answer is blank"
    elif not ids:
      problem = f"the candidate answer {answer!r} has no token"
    elif length > max_positions:
      problem = (
        f"the candidate answer {answer[:40]!r}... has {length} tokens with [CLS] and [SEP], more "
        f"than config.model.max_positions={max_positions}"
      )
    elif ids in numbers:
      first = numbers[ids]
      same = "repeats" if answers[first - 1] == answer else "has the same tokens as"
      problem = f"the candidate answer {answer!r} {same} entry {first}, {answers[first - 1]!r}"
    if problem:
      bad.add(RecordError(f"{origin}, entry {number}: {problem}."))
      continue
    numbers[ids] = number
    kept.append(answer)
    if length > max_trained:
      long.append(f"{number} ({answer!r})")
  bad.report(len(answers), f"candidate answers of {origin}")
  if long:
    logging.warning(
      "%s: %d of %d candidate answers have more tokens with [CLS] and [SEP] than training keeps "
      "(config.data.max_answer_tokens=%d) and are unlikely to be chosen: entry %s.",
      *(origin, len(long), len(answers), max_trained, _first(long)),
    )
  if not kept:
    raise ValueError(
      f"{origin} holds no candidate answer that can be chosen; give at least one that is not blank."
    )
  return tuple(kept)
