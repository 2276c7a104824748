"""Text cleaning of the official pipeline, and the question string of VQA. Pure Python."""

import re

SPACED = "-/"  # become spaces
DELETED = ",.'!?\"()*#:;~"
_CLEANED = str.maketrans(SPACED, "  ", DELETED)
_SPACES = re.compile(r"\s{2,}")


def _clean(text: str) -> str:
  """Lower-cases a text, deletes punctuation, and replaces `-` and `/` by spaces."""
  return text.lower().translate(_CLEANED)


def pre_question(text: str, max_words: int) -> str:
  """Cleans a question as the official code does.

  Repeated spaces are kept, and the empty strings between them count as words.

  Args:
    text: the question.
    max_words: further words are cut.
  """
  return " ".join(_clean(text).rstrip(" ").split(" ")[:max_words])


def pre_caption(text: str, max_words: int) -> str:
  """Cleans a caption: as `pre_question`, with single spaces, and `person` for `<person>`.

  Args:
    text: the caption.
    max_words: further words are cut.
  """
  text = _SPACES.sub(" ", _clean(text).replace("<person>", "person"))
  return " ".join(text.rstrip("\n").strip(" ").split(" ")[:max_words])


def vqa_text(
  question: str, ocr: str = "", objects: str = "", add_ocr: bool = False, add_objects: bool = False
) -> str:
  """Joins the input of the VQA text encoder: question [SEP] words in the image [SEP] objects.

  Args:
    question: the question; case and punctuation are kept (the tokenizer lower-cases).
    ocr: words read in the image, joined by spaces; cleaned by `pre_question`, at most 30 words.
    objects: labels joined by `&&` or by spaces; repeated labels are kept.
    add_ocr: appends `ocr` if it is not empty.
    add_objects: appends `objects` if it is not empty.
  """
  parts = [question]
  if add_ocr and ocr:
    parts.append(pre_question(ocr, 30))
  if add_objects and objects:
    parts.append(objects.replace("&&", " "))
  return " [SEP] ".join(parts)
