"""WordPiece tokenizer with BERT's vocabulary."""

import json
from collections.abc import Iterable

import tokenizers

from mplug_jax.data.text.tokenizer_base import BOS, EOS, PAD, SPECIAL_TOKENS, UNK, FileTokenizer

# The official detokenisation, in this order.
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
  """BERT's uncased WordPiece: lower case, no accents, Chinese characters one by one.

  Args:
    source: path of a vocab.txt (one token per line, the line number from 0 is the id) or of a
      tokenizer.json of such a tokenizer, or the bytes of either.
    append_sep: end every text with [SEP], as the ModelScope release does.
  """

  kind, file_name = "wordpiece", "vocab.txt"

  def __init__(self, source, append_sep: bool = False):
    super().__init__(source, append_sep=append_sep)

  def _read(self, data):
    return _vocabulary_of_json(data, self._where) if data.lstrip().startswith(b"{") else data

  def _build(self):
    # Not splitlines: vocabularies contain exotic line separators as tokens.
    tokens = self._data.decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
    vocab = {}
    for line, token in enumerate(tokens):
      if vocab.setdefault(token, line) != line:
        raise ValueError(
          f"{self._where}, line {line + 1}: token {token!r} stands already in line "
          f"{vocab[token] + 1}; a vocabulary names every token once."
        )
    self.vocab_size, self._tokens, self._lookup = len(tokens), tokens, vocab.get
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

  def to_json(self) -> str:
    """The same tokenizer for the tokenizers library, the contents of a tokenizer.json.

    Without the options of this one.
    """
    return self._backend.to_str()

  def _encode(self, text: str) -> tuple[int, ...]:
    ids = self._backend.encode(text, add_special_tokens=False).ids
    return self.bos_id, *ids, *([self.eos_id] if self._options["append_sep"] else [])

  def decode(self, ids: Iterable[int]) -> str:
    text = " ".join(self._tokens[i] for i in ids).replace(" ##", "").strip()
    for old, new in CLEAN_UP:
      text = text.replace(old, new)
    # After the clean-up, as in the official code: "a. [SEP]" and not "a .".
    for name in (EOS, BOS, PAD):
      text = text.replace(name, "")
    return text.strip()


# What the parts of a tokenizer.json must say for it to be this tokenizer; keys that are missing
# count as their defaults.
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


def _vocabulary_of_json(data, where):
  """The tokenizer.json of an uncased WordPiece tokenizer -> its vocab.txt, bytes.

  Raises:
    ValueError: no json, another kind of tokenizer, or ids with gaps.
  """
  try:
    content = json.loads(data)
    for part, (expected, defaults) in _JSON_PARTS.items():
      said = defaults | (content.get(part) or {})
      for key, value in expected.items():
        if said.get(key) != value:
          raise ValueError(
            f"{where} is no uncased WordPiece tokenizer: {part}.{key} is {said.get(key)!r}, and "
            f"must be {value!r} here."
          )
    if content["normalizer"].get("strip_accents") is False:
      raise ValueError(
        f"{where} keeps accents: normalizer.strip_accents is false, and must be true or null here."
      )
    tokens = {int(number): token for token, number in content["model"]["vocab"].items()}
    tokens |= {int(added["id"]): added["content"] for added in content.get("added_tokens", ())}
  except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
    raise ValueError(
      f"{where} is neither a vocabulary nor a tokenizer.json ({error!r})."
    ) from error
  if sorted(tokens) != list(range(len(tokens))):
    raise ValueError(
      f"{where}: the ids of its {len(tokens)} tokens are not 0 to {len(tokens) - 1}."
    )
  return "".join(f"{tokens[number]}\n" for number in range(len(tokens))).encode()
