"""Text cleaning of the official pipeline, and the question string of VQA. Pure Python."""

import re

SPACED, DELETED = "-/", ",.'!?\"()*#:;~"
_CLEANED = str.maketrans(SPACED, "  ", DELETED)
_SPACES = re.compile(r"\s{2,}")


def _clean(text: str) -> str:
  """Lower case, punctuation deleted, `-` and `/` become spaces."""
  return text.lower().translate(_CLEANED)


def pre_question(text: str, max_words: int) -> str:
  """Cleans a question: at most `max_words` words, counted between single spaces.

  Runs of spaces are kept, and the empty strings between them count as words, as in the official
  code.
  """
  return " ".join(_clean(text).rstrip(" ").split(" ")[:max_words])


def pre_caption(text: str, max_words: int) -> str:
  """Cleans a caption: as `pre_question`, white space collapsed, `<person>` turned into `person`."""
  text = _SPACES.sub(" ", _clean(text).replace("<person>", "person"))
  return " ".join(text.rstrip("\n").strip(" ").split(" ")[:max_words])


def vqa_text(
  question: str, ocr: str = "", objects: str = "", add_ocr: bool = False, add_objects: bool = False
) -> str:
  """The string that the VQA text encoder reads: question [SEP] words in the image [SEP] objects.

  Args:
    question: as asked; case and punctuation are kept (the tokenizer lower-cases).
    ocr: words read in the image, joined by spaces; cleaned by `pre_question`, at most 30 words.
    objects: labels joined by `&&` or by spaces; repeated labels are kept.
    add_ocr: append `ocr` when it is not empty.
    add_objects: append `objects` when it is not empty.
  """
  parts = [question]
  if add_ocr and ocr:
    parts.append(pre_question(ocr, 30))
  if add_objects and objects:
    parts.append(objects.replace("&&", " "))
  return " [SEP] ".join(parts)
