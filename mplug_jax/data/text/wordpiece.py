"""WordPiece tokenizer with BERT's vocabulary."""

import json
import os
from collections.abc import Iterable

import tokenizers

from mplug_jax.data.text import unicode
from mplug_jax.data.text.tokenizer_base import BOS, EOS, PAD, SPECIAL_TOKENS, UNK, FileTokenizer

# The official detokenization, in this order.
CLEAN_UP = (
  (" .", "."),
  (" ?", "?"),
  (" !", "!"),
  (" ,", ","),
  (" ' ", "'"),
  (" n't", "n't"),
  (" 'm", "'m"),
  (" 's", "'s"),
  (" 've", "'ve"),
  (" 're", "'re"),
)


class WordPieceTokenizer(FileTokenizer):
  """BERT's uncased WordPiece: lower case, no accents, Chinese characters one by one."""

  kind = "wordpiece"
  file_name = "vocab.txt"

  def __init__(self, source: str | os.PathLike[str] | bytes, append_sep: bool = False):
    """Reads the tokenizer.

    Args:
      source: path of a vocab.txt (one token per line, the line number from 0 is the id) or of a
        tokenizer.json of such a tokenizer, or the bytes of either.
      append_sep: ends every text with [SEP], as the ModelScope release does.
    """
    super().__init__(source, append_sep=append_sep)

  def _read(self, data: bytes) -> bytes:
    text = unicode.decode(data, self._origin)
    return (_vocabulary_of_json(text, self._origin) if text.lstrip()[:1] == "{" else text).encode()

  def _build(self) -> None:
    # Not splitlines: vocabularies contain exotic line separators as tokens.
    tokens = self._data.decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
    vocab = {}
    for line, token in enumerate(tokens):
      if vocab.setdefault(token, line) != line:
        raise ValueError(
          f"{self._origin}, line {line + 1}: token {token!r} repeats line {vocab[token] + 1}; "
          f"list every token once."
        )
    self.vocab_size = len(tokens)
    self._tokens = tokens
    self._vocab = vocab
    for name in SPECIAL_TOKENS:
      self.token_id(name)
    backend = tokenizers.Tokenizer(
      tokenizers.models.WordPiece(vocab, unk_token=UNK, max_input_chars_per_word=100)
    )
    backend.normalizer = tokenizers.normalizers.BertNormalizer(
      clean_text=True, handle_chinese_chars=True, strip_accents=True, lowercase=True
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(
      [tokenizers.AddedToken(name, normalized=False) for name in SPECIAL_TOKENS]
    )
    self._backend = backend

  def _lookup(self, name: str) -> int | None:
    return self._vocab.get(name)

  def to_json(self) -> str:
    """Returns the contents of a tokenizer.json for the tokenizers library, without the options."""
    return self._backend.to_str()

  def _encode(self, text: str) -> tuple[int, ...]:
    ids = self._backend.encode(text, add_special_tokens=False).ids
    return self.bos_id, *ids, *([self.eos_id] if self._options["append_sep"] else [])

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids, cleaned up as the official code does.

    Args:
      ids: token ids.
    """
    text = " ".join(self._tokens[i] for i in ids).replace(" ##", "").strip()
    for old, new in CLEAN_UP:
      text = text.replace(old, new)
    # After the clean-up, as in the official code: "a. [SEP]" and not "a .".
    for name in (EOS, BOS, PAD):
      text = text.replace(name, "")
    return text.strip()


# Required values and defaults of the parts of a tokenizer.json.
_JSON_PARTS = {
  "model": (
    {"type": "WordPiece", "unk_token": UNK, "continuing_subword_prefix": "##"},
    {"type": "WordPiece"},
  ),
  "normalizer": (
    {"type": "BertNormalizer", "lowercase": True, "clean_text": True, "handle_chinese_chars": True},
    {"clean_text": True, "handle_chinese_chars": True, "lowercase": True},
  ),
  "pre_tokenizer": ({"type": "BertPreTokenizer"}, {}),
}


def _vocabulary_of_json(data: str, origin: str) -> str:
  """Converts the tokenizer.json of an uncased WordPiece tokenizer to the text of a vocab.txt.

  Raises:
    ValueError: no JSON, another kind of tokenizer, ids with gaps, or an invalid token.
  """
  try:
    content = json.loads(data)
    for part, (expected, defaults) in _JSON_PARTS.items():
      settings = defaults | (content.get(part) or {})
      for key, value in expected.items():
        if settings.get(key) != value:
          raise ValueError(
            f"{origin} is no uncased WordPiece tokenizer: {part}.{key} is {settings.get(key)!r}, "
            f"and must be {value!r} here."
          )
    if content["normalizer"].get("strip_accents") is False:
      raise ValueError(
        f"{origin} keeps accents: normalizer.strip_accents is false, and must be true or null here."
      )
    tokens = {int(number): token for token, number in content["model"]["vocab"].items()}
    tokens |= {int(added["id"]): added["content"] for added in content.get("added_tokens", ())}
  except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
    raise ValueError(
      f"{origin} is neither a vocabulary nor a tokenizer.json ({error!r})."
    ) from error
  if sorted(tokens) != list(range(len(tokens))):
    raise ValueError(
      f"{origin}: the ids of its {len(tokens)} tokens are not 0 to {len(tokens) - 1}."
    )
  for number, token in tokens.items():
    if unicode.invalid_unicode(token):
      raise ValueError(f"{origin}: token {number} is {unicode.problem(token)}.")
  return "".join(f"{tokens[number]}\n" for number in range(len(tokens)))
