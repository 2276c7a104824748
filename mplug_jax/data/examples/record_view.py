"""View of a record for the data check: its texts, images, ids and boxes.

Each module of data.EXAMPLES has one `View`, named VIEW.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from mplug_jax.config import Config
from mplug_jax.data.text import cleaning
from mplug_jax.data.text.tokenizer_base import Tokenizer
from mplug_jax.data.types import Record, Source


class Text(NamedTuple):
  """A text of a record.

  Attributes:
    kind: "question", "caption", ...; a key of View.limits.
    text: cleaned as the task cleans it, not cut.
    encoded: the text that the tokenizer gets.
  """

  kind: str
  text: str
  encoded: str


class Item(NamedTuple):
  """Contents of a record that are checked.

  Attributes:
    images: as decode_image or read_clip take them.
    ids: of the entries of the record.
    texts: all texts.
    shown: (text, reply) pairs for the sheet of samples.
    answers: answers of each question.
    label: class of the record.
    boxes: (phrase, corners) pairs.
  """

  images: list[Any]
  ids: list[Any]
  texts: list[Text]
  shown: list[tuple[str, str]]
  answers: tuple[list[str], ...] = ()
  label: str | None = None
  boxes: tuple[tuple[str, Any], ...] = ()


class Limit(NamedTuple):
  """Limit of the tokens of a text.

  Attributes:
    key: key of config.data.
    ends: True if a final [SEP] counts.
  """

  key: str
  ends: bool


def _no_prefix(config: Config, tokenizer: Tokenizer) -> str:
  del config, tokenizer
  return ""


def _no_notes(
  source: Source, numbers: Iterable[int], config: Config, split: str, tokenizer: Tokenizer | None
) -> list[str]:
  del source, numbers, config, split, tokenizer
  return []


class View(NamedTuple):
  """Access to the records of a task for the data check.

  Attributes:
    source: function of (config.data, split) that returns whole records.
    item: function of (record, config.data).
    entries: name of the entries of a record, in the plural.
    limits: {kind of text: its limit}.
    prefix: function of (config, tokenizer) that returns the text put before each text.
    notes: function of (source, numbers of records, config, split, tokenizer or None) that returns
      sentences about records that the evaluation cannot score.
  """

  source: Callable[[Config, str], Source]
  item: Callable[[Record, Config], Item]
  entries: str
  limits: Mapping[str, Limit]
  prefix: Callable[[Config, Tokenizer], str] = _no_prefix
  notes: Callable[[Source, Iterable[int], Config, str, Tokenizer | None], list[str]] = _no_notes


def cleaned(kind: str, text: str, max_words: int) -> Text:
  """Returns a caption or statement as `cleaning.pre_caption` cleans it.

  Args:
    kind: kind of the text.
    text: the text as it was read.
    max_words: words that the tokenizer gets.
  """
  return Text(kind, cleaning.pre_caption(text, len(text)), cleaning.pre_caption(text, max_words))
