"""What the data check reads from a record of each task: texts, image, boxes."""

from typing import Any, NamedTuple

from mplug_jax.data.examples import classification, grounding, retrieval
from mplug_jax.data.sources import caption, vqa
from mplug_jax.data.text import cleaning


class Text(NamedTuple):
  """A text of a record.

  Kind: what it is called. text: cleaned as the task cleans it, not cut. read: what the tokenizer
  gets of it.
  """

  kind: str
  text: str
  read: str


class Item(NamedTuple):
  """What is checked of one record.

  Images: as decode_image or read_clip take them. ids: of its entries. shown: (text, what is said to
  it) pairs for people to look at. answers: lists, of every question. label: the class. boxes:
    (phrase, corners).
  """

  images: list
  ids: list
  texts: list
  shown: list
  answers: tuple = ()
  label: str | None = None
  boxes: tuple = ()


def _vqa(record, data):
  questions = record["questions"]
  texts = [
    (
      q["question"],
      cleaning.vqa_text(q["question"], q["ocr"], q["objects"], data.add_ocr, data.add_objects),
    )
    for q in questions
  ]
  answers = [answer for q in questions for answer in dict.fromkeys(q["answers"])]
  return Item(
    [record["image"]],
    [q["question_id"] for q in questions],
    [Text("question", *text) for text in texts]
    + [Text("answer", answer, answer) for answer in answers],
    [(q["question"], ", ".join(dict.fromkeys(q["answers"]))) for q in questions],
    answers=tuple(q["answers"] for q in questions),
  )


def _caption(record, data):
  del data
  return Item(
    [record["image"]],
    [record["image_id"]],
    [Text("caption", text, text) for text in record["captions"]],
    [("", text) for text in record["captions"]],
  )


def _retrieval(record, data):
  return Item(
    [record["image"]],
    [record["image_id"]],
    [_cleaned("caption", text, data) for text in record["captions"]],
    [("", text) for text in record["captions"]],
  )


def _grounding(record, data):
  del data
  phrases = record["expressions"]
  return Item(
    [record["image"]],
    [p["id"] for p in phrases if "id" in p],
    [Text("phrase", p["text"], p["text"].lower()) for p in phrases],
    [("", p["text"]) for p in phrases[:1]],
    boxes=tuple((p["text"], p["box"]) for p in phrases if p["box"] is not None),
  )


def _classification(record, data):
  sentence = record["sentence"]
  return Item(
    record["images"],
    [record["id"]],
    [_cleaned("sentence", sentence, data)],
    [(sentence, record["label"] or "(no label)")],
    label=record["label"],
  )


def _cleaned(kind, text, data):
  return Text(
    kind, cleaning.pre_caption(text, len(text)), cleaning.pre_caption(text, data.max_words)
  )


class _View(NamedTuple):
  """How the records of a task are read and checked.

  Entries: what they are called. limits: of every kind of text, the key of
  config.data that limits its tokens and whether [SEP] is one of them.
  """

  source: Any  # (config.data, split) -> source
  item: Any  # (record, config.data) -> Item
  entries: str
  limits: dict


VIEWS = {  # by config.data.examples
  "vqa": _View(
    vqa.get,
    _vqa,
    "questions",
    {"question": ("max_question", False), "answer": ("max_answer_tokens", True)},
  ),
  "caption": _View(caption.images, _caption, "images", {"caption": ("max_caption", True)}),
  "retrieval": _View(
    retrieval.get_images, _retrieval, "images", {"caption": ("max_caption", False)}
  ),
  "pretrain": _View(
    retrieval.get_images, _retrieval, "images", {"caption": ("max_caption", False)}
  ),
  "grounding": _View(grounding.get_source, _grounding, "phrases", {"phrase": ("max_phrase", True)}),
  "classification": _View(
    classification.get_source, _classification, "statements", {"sentence": ("max_text", False)}
  ),
}
