"""VQA records -> examples of fixed shape: an image, Q questions and their weighted answers."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mplug_jax.config import Config
from mplug_jax.data.errors import BadRecords, RecordError
from mplug_jax.data.examples import record_view, vqa_answers
from mplug_jax.data.images import reader
from mplug_jax.data.sources import vqa
from mplug_jax.data.text import cleaning, token_rows
from mplug_jax.data.text.tokenizer_base import Tokenizer
from mplug_jax.data.types import Example, Record, Source


def get_source(data: Config, split: str) -> Source:
  """Returns the records of one split, see sources/vqa.py.

  Args:
    data: config.data.
    split: "train", "val" or "test".
  """
  return vqa.get(data, split)


def texts(source: Source, records: int = 0) -> Iterator[str]:
  """Yields questions and answers, see sources/vqa.py.

  Args:
    source: training records.
    records: number of records, evenly spaced; 0 = all.
  """
  return vqa.texts(source, records)


def weighted_answers(question: dict[str, Any]) -> tuple[list[str], list[float]]:
  """Returns the unique answers of a question in order of appearance, and their weights.

  If the question gives no weights, an answer has the share of annotators who gave it; the weights
  sum to 1, as in the official fine-tuning.

  Args:
    question: entry of record["questions"].

  Raises:
    ValueError: the number of weights is not the number of unique answers; names the question_id.
  """
  answers = question["answers"]
  weights = question["weights"]
  unique = list(dict.fromkeys(answers))
  if weights is None:
    return unique, [answers.count(answer) / len(answers) for answer in unique]
  if len(weights) != len(unique):
    raise ValueError(
      f"Question {question['question_id']} has {len(unique)} unique answers but "
      f"{len(weights)} weights."
    )
  return unique, weights


class VqaTransform:
  """Transform for `pipeline`: called with (index, record, rng), it returns an example.

  The keys of an example are image u8[H, W, 3], not normalized; question i32[Q, L] and answer
  i32[Q, A, T], padded with the pad id; answer_weight f32[Q, A], 0 = padding; question_valid
  bool[Q]; corrupt bool[]; index i32[].

  Training picks Q of the record's questions at random without replacement. A record with fewer
  leaves the rest invalid. An answer is [bos] pieces [eos]; one longer than T loses pieces, never
  its [eos], and is counted in `truncated_answers` (distinct texts). An unreadable image gives
  zeros, corrupt and no valid question; in evaluation it keeps the texts of the questions, because
  results need an answer to every question. A training question without answers is not valid; it is
  counted and named in the log.

  In evaluation, where no answer is read, only the first A unique answers are encoded.

  A call raises ValueError for a training question with more unique answers than A and, in
  evaluation, for more questions than Q (use `chunked.Chunked`); if `strict`, RecordError for a
  training question without answers; ImageError for an unreadable image, if `images` is strict.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    images: reader.ImageReader,
    *,
    questions_per_image: int,
    max_question: int,
    max_answers: int,
    max_answer_tokens: int,
    train: bool,
    add_ocr: bool = False,
    add_objects: bool = False,
    strict: bool = False,
  ):
    """Makes the transform.

    Args:
      tokenizer: tokenizer of the run.
      images: reads the images.
      questions_per_image: Q.
      max_question: L, tokens of question, OCR words and object labels with [bos]; the rest is cut,
        in evaluation too (docs/official.md item 34).
      max_answers: A, unique answers of a question.
      max_answer_tokens: T, with [bos] and [eos]; at least 3.
      train: draws questions, and requires answers.
      add_ocr: appends the words found in the image to the question.
      add_objects: appends the object labels found in the image to the question.
      strict: raises RecordError for a training question without answers.
    """
    self._bad = BadRecords(strict, "It has no weight.")
    self._pad_id = tokenizer.pad_id
    self._images = images
    self._questions_per_image = questions_per_image
    self._max_answers = max_answers
    self._question_rows = token_rows.TokenRows(tokenizer, max_question)
    self._answer_rows = token_rows.TokenRows(tokenizer, max_answer_tokens, ends=True)
    self._train = train
    self._add_ocr = add_ocr
    self._add_objects = add_objects

  @property
  def truncated_answers(self) -> int:
    """Number of distinct answers that were cut."""
    return self._answer_rows.cut

  def __call__(self, index: int, record: Record, rng: np.random.Generator | None) -> Example:
    """Makes an example; `rng` is None in evaluation."""
    count = self._questions_per_image
    questions = self._pick(record["questions"], rng)
    image, corrupt = self._images(record["image"], record["image_id"], rng)
    shape = (count, self._max_answers, self._answer_rows.length)
    example = {
      "image": image,
      "question": np.full((count, self._question_rows.length), self._pad_id, np.int32),
      "answer": np.full(shape, self._pad_id, np.int32),
      "answer_weight": np.zeros((count, self._max_answers), np.float32),
      "question_valid": np.zeros(count, np.bool_),
      "corrupt": np.bool_(corrupt),
      "index": np.int32(index),
    }
    if not (corrupt and self._train):
      for slot, question in enumerate(questions):
        self._fill(example, slot, question)
    if corrupt:
      example["question_valid"][:] = False
      example["answer_weight"][:] = 0.0
    return example

  def _pick(self, questions, rng):
    count = self._questions_per_image
    if len(questions) <= count:
      return questions
    if not self._train:
      raise ValueError(
        f"it has {len(questions)} questions, more than the {count} of a row; wrap "
        "the source in Chunked, so that none is left out."
      )
    return [questions[i] for i in rng.choice(len(questions), count, replace=False)]

  def _fill(self, example, slot, question):
    text = cleaning.vqa_text(
      question["question"], question["ocr"], question["objects"], self._add_ocr, self._add_objects
    )
    example["question"][slot] = self._question_rows(text)
    example["question_valid"][slot] = True
    answers, weights = weighted_answers(question)
    if len(answers) > self._max_answers and self._train:
      raise ValueError(
        f"question {question['question_id']} has {len(answers)} different answers, "
        f"more than max_answers {self._max_answers}."
      )
    if self._train and not answers:
      self._bad.add(RecordError(f"Question {question['question_id']} has no answer to train on."))
      example["question_valid"][slot] = False
    for number, answer in enumerate(answers[: self._max_answers]):
      example["answer"][slot, number] = self._answer_rows(answer)
    example["answer_weight"][slot, : len(weights)] = weights[: self._max_answers]


def make_transform(config: Config, tokenizer: Tokenizer, train: bool) -> VqaTransform:
  """Returns the transform that config.data and config.model describe.

  Args:
    config: config of the run.
    tokenizer: tokenizer of the run.
    train: draws questions, and requires answers.
  """
  data = config.data
  return VqaTransform(
    tokenizer,
    reader.reader(config),
    questions_per_image=data.questions_per_image,
    max_question=data.max_question,
    max_answers=data.max_answers,
    max_answer_tokens=data.max_answer_tokens,
    train=train,
    add_ocr=data.add_ocr,
    add_objects=data.add_objects,
    strict=data.strict,
  )


def _item(record: Record, data: Config) -> record_view.Item:
  questions = record["questions"]
  texts = []
  for question in questions:
    text = question["question"]
    encoded = cleaning.vqa_text(
      text, question["ocr"], question["objects"], data.add_ocr, data.add_objects
    )
    texts.append(record_view.Text("question", text, encoded))
  for question in questions:
    unique = dict.fromkeys(question["answers"])
    texts += [record_view.Text("answer", answer, answer) for answer in unique]
  return record_view.Item(
    images=[record["image"]],
    ids=[question["question_id"] for question in questions],
    texts=texts,
    shown=[(q["question"], ", ".join(dict.fromkeys(q["answers"]))) for q in questions],
    answers=tuple(question["answers"] for question in questions),
  )


def _notes(
  source: Source, numbers: Iterable[int], config: Config, split: str, tokenizer: Tokenizer | None
) -> list[str]:
  questions = (question for i in numbers for question in vqa.questions_of(source, i))
  return vqa_answers.unscorable(config, split, questions, tokenizer)


VIEW = record_view.View(
  source=vqa.get,
  item=_item,
  notes=_notes,
  entries="questions",
  limits={
    "question": record_view.Limit("max_question", ends=False),
    "answer": record_view.Limit("max_answer_tokens", ends=True),
  },
)
