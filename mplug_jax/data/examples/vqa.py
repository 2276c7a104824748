"""VQA records -> examples of fixed shape: an image, Q questions and their weighted answers."""

import numpy as np

from mplug_jax.data.images import reader
from mplug_jax.data.sources import vqa
from mplug_jax.data.text import cleaning, token_rows


def get_source(data, split):
  """See `sources.get`."""
  return vqa.get(data, split)


def texts(source, records=0):
  """See `sources.texts`."""
  return vqa.texts(source, records)


def weighted_answers(question: dict) -> tuple[list[str], list[float]]:
  """The unique answers of a question in order of appearance, and their weights.

  Without weights of its own, an answer weighs the share of annotators who gave it; the weights sum
  to 1, as in the official fine-tuning.

  Raises:
    ValueError: the number of weights is not the number of unique answers; names the question_id.
  """
  answers, weights = question["answers"], question["weights"]
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
  """A transform for `pipeline`: called with (index, record, rng), returns an example.

  Its keys: image u8[H, W, 3], not normalised; question i32[Q, L] and answer i32[Q, A, T], padded
  with the pad id; answer_weight f32[Q, A], 0 = padding; question_valid bool[Q]; corrupt bool[];
  index i32[].

  Training picks Q of the record's questions at random without replacement. A record with fewer
  leaves the rest invalid. An answer is [bos] pieces [eos]; one longer than T loses pieces, never
  its [eos], and is counted in `truncated_answers` (distinct texts). An image that cannot be read
  gives zeros, corrupt and no valid question; in evaluation the questions' texts are there, because
  results need an answer to every question.

  Args:
    tokenizer: as in `mplug_jax.data.text.tokenizer`.
    images: an ImageReader.
    questions_per_image: Q.
    max_question: L, tokens of question, OCR words and object labels with [bos]; the rest is cut,
      in evaluation too (docs/official.md item 34).
    max_answers: A, unique answers of a question.
    max_answer_tokens: T, with [bos] and [eos]; at least 3.
    train: draw questions, and insist on answers.
    add_ocr, add_objects: append the words and labels found in the image to the question.

  Raises (when called):
    ValueError: more unique answers than A, a training question without answers, or, in evaluation,
      more questions than Q (use `chunked.Chunked`).
    ImageError: a strict ImageReader met an image that cannot be read.
  """

  def __init__(
    self,
    tokenizer,
    images,
    *,
    questions_per_image: int,
    max_question: int,
    max_answers: int,
    max_answer_tokens: int,
    train: bool,
    add_ocr: bool = False,
    add_objects: bool = False,
  ):
    self._pad_id = tokenizer.pad_id
    self._images = images
    self._questions_per_image = questions_per_image
    self._max_answers = max_answers
    self._question_rows = token_rows.TokenRows(tokenizer, max_question)
    self._answer_rows = token_rows.TokenRows(tokenizer, max_answer_tokens, ends=True)
    self._train = train
    self._add_ocr, self._add_objects = add_ocr, add_objects

  @property
  def truncated_answers(self) -> int:
    return self._answer_rows.cut

  def __call__(self, index: int, record: dict, rng: np.random.Generator | None) -> dict:
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
    if len(answers) > self._max_answers:
      raise ValueError(
        f"question {question['question_id']} has {len(answers)} different answers, "
        f"more than max_answers {self._max_answers}."
      )
    if self._train and not answers:
      raise ValueError(f"question {question['question_id']} has no answer to train on.")
    for number, answer in enumerate(answers):
      example["answer"][slot, number] = self._answer_rows(answer)
    example["answer_weight"][slot, : len(weights)] = weights


def candidate_answers(config) -> tuple[str, ...]:
  """The answers to choose from: config.task.rank_answers, or with config.task.predict=rank the list in config.data.answer_list.

  Raises:
    ValueError, FileNotFoundError: config.task.predict is unknown, or there is nothing to choose
      from.
  """
  known = ("generate", "rank")
  if config.task.predict not in known:
    raise ValueError(
      f"config.task.predict={config.task.predict!r} is not one of {', '.join(known)}."
    )
  if config.task.rank_answers or config.task.predict == "generate":
    return tuple(config.task.rank_answers)
  if not config.data.get("answer_list"):
    raise ValueError(
      "config.task.predict=rank chooses from config.task.rank_answers, or from the json list "
      "config.data.answer_list "
      "of a source of files, and neither is given."
    )
  return tuple(vqa.answer_list(config.data))


def make_transform(config, tokenizer, train: bool) -> VqaTransform:
  """The transform that config.data and config.model describe."""
  return VqaTransform(
    tokenizer,
    reader.reader(config),
    train=train,
    **{
      name: config.data[name]
      for name in (
        "questions_per_image",
        "max_question",
        "max_answers",
        "max_answer_tokens",
        "add_ocr",
        "add_objects",
      )
    },
  )
