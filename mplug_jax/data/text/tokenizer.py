"""Tokenizers behind one small protocol: WordPiece over a vocabulary file or a tokenizer.json, and SentencePiece.

Both read the literal strings "[CLS]", "[SEP]", "[MASK]", "[PAD]" and "[UNK]" inside a text as the
special tokens, with or without spaces around them. Ids are looked up by name.
"""

import functools
import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers

from mplug_jax.runtime.atomic_files import write_atomic, write_json

PAD, UNK, BOS, EOS, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONFIG_FILE = "tokenizer_config.json"

_CACHED_TEXTS = 32_768
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


class Tokenizer(Protocol):
  """What models and data need of a tokenizer. bos is [CLS], eos is [SEP]."""

  vocab_size: int
  pad_id: int
  bos_id: int
  eos_id: int
  unk_id: int
  mask_id: int
  fingerprint: str  # sha256 in hex of the defining file and options

  def encode(self, text: str) -> list[int]:
    """[bos, pieces...]; ends with eos only if the text does (docs/official.md item 31)."""

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids, without [PAD], [CLS] and [SEP]; does not stop at any of them."""

  def token_id(self, name: str) -> int:
    """Id of the token called `name`; ValueError if there is none."""

  def save(self, directory) -> None:
    """Writes what `load` reads; every file appears complete or not at all."""


class _FileTokenizer:
  """Common part: a tokenizer defined by the bytes of one file and by options."""

  kind: str
  file_name: str

  def __init__(self, source, **options):
    if isinstance(source, bytes):
      self._data, self._where = source, f"the {self.kind} data"
    else:
      self._where = os.fspath(source)
      try:
        self._data = pathlib.Path(source).read_bytes()
      except FileNotFoundError as error:
        raise FileNotFoundError(f"Tokenizer file {self._where} does not exist.") from error
    if not self._data:
      raise ValueError(f"Tokenizer file {self._where} is empty.")
    self._data = self._read(self._data)
    self._options = options
    described = json.dumps({"kind": self.kind, **options}, sort_keys=True).encode()
    self.fingerprint = hashlib.sha256(described + b"\0" + self._data).hexdigest()
    self._build()
    self.pad_id, self.unk_id, self.bos_id, self.eos_id, self.mask_id = map(
      self.token_id, SPECIAL_TOKENS
    )
    self._cached = functools.lru_cache(_CACHED_TEXTS)(self._encode)

  def _read(self, data):
    """The bytes of the file -> those that define the tokenizer and are saved."""
    return data

  def __reduce__(self):  # Data workers get the bytes, not the path; caches are not shared.
    return functools.partial(type(self), self._data, **self._options), ()

  def encode(self, text: str) -> list[int]:
    return list(self._cached(text))

  def token_id(self, name: str) -> int:
    found = self._lookup(name)
    if found is None:
      raise ValueError(
        f"Token {name!r} is not in {self._where}, a vocabulary of "
        f"{self.vocab_size} {self.kind} tokens."
      )
    return found

  def save(self, directory) -> None:
    config = {
      "kind": self.kind,
      "file": self.file_name,
      "options": self._options,
      "fingerprint": self.fingerprint,
    }
    os.makedirs(directory, exist_ok=True)
    write_atomic(os.path.join(directory, self.file_name), self._data)
    write_json(os.path.join(directory, CONFIG_FILE), config)


class WordPieceTokenizer(_FileTokenizer):
  """BERT's uncased WordPiece: lower case, no accents, Chinese characters one by one.

  Args:
    source: path of a vocab.txt (one token per line, the line number from 0 is the id) or of a tokenizer.json of such a
      tokenizer, or the bytes of either.
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
    """The same tokenizer for the tokenizers library, the contents of a tokenizer.json; without the options of this one."""
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


# What the parts of a tokenizer.json must say for it to be this tokenizer; keys that are missing count as their defaults.
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
            f"{where} is no uncased WordPiece tokenizer: {part}.{key} is {said.get(key)!r}, and must be {value!r} here."
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


class SentencePieceTokenizer(_FileTokenizer):
  """A SentencePiece model that has the pieces [PAD], [UNK], [CLS], [SEP] and [MASK].

  Control symbols of the model ([MASK], extra tokens) are read literally inside texts too.

  Args:
    source: path of a .model file, or its bytes.
  """

  kind, file_name = "sentencepiece", "tokenizer.model"

  def _build(self):
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=self._data)
    except (RuntimeError, ValueError, OSError) as error:
      raise ValueError(f"{self._where} is not a SentencePiece model.") from error
    self.vocab_size = len(self._model)
    literal = {
      self._model.id_to_piece(i) for i in range(self.vocab_size) if self._model.is_control(i)
    } | set(SPECIAL_TOKENS)
    # Longest first, so that "<loc_12>" never loses to a token it starts with.
    names = sorted(literal, key=len, reverse=True)
    self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")").split
    # What decode writes itself; [UNK] is left to the model, which knows the spaces around it.
    self._literal = {
      self._lookup(name): "" if name in (PAD, BOS, EOS) else name for name in names if name != UNK
    }

  def _lookup(self, name: str) -> int | None:
    found = self._model.piece_to_id(name)  # the unknown id for what it does not know
    return found if self._model.id_to_piece(found) == name else None

  def _encode(self, text: str) -> tuple[int, ...]:
    ids = [self.bos_id]
    # Every second part is a literal token. Left to the model, the space before it would be a piece.
    for i, part in enumerate(self._split(text)):
      ids += [self.token_id(part)] if i % 2 else self._model.encode(part)
    return tuple(ids)

  def decode(self, ids: Iterable[int]) -> str:
    parts, run = [], []
    for i in (*map(int, ids), self.pad_id):  # the pad at the end flushes the last run
      if i not in self._literal:
        run.append(i)
        continue
      parts += [self._model.decode(run), self._literal[i]]
      run = []
    return " ".join(part for part in parts if part)


def train_sentencepiece(
  texts: Iterable[str], vocab_size: int, directory, extra_tokens: Sequence[str] = ()
) -> SentencePieceTokenizer:
  """Fits a lower-casing BPE model to texts and saves it; the same texts give the same model.

  BPE, because on a corpus of few distinct sentences it keeps whole words, which a unigram model
  breaks up: sequences are half as long.

  Args:
    texts: the corpus; literal special tokens in it are ignored.
    vocab_size: upper bound, special and extra tokens included; a small corpus gives fewer.
    directory: where `load` will find it.
    extra_tokens: names of further special tokens (e.g. locations), ids from 5 in this order.

  Raises:
    ValueError: no text, or a vocabulary smaller than the characters of the corpus need.
  """
  literal = re.compile(
    "|".join(map(re.escape, sorted((*SPECIAL_TOKENS, *extra_tokens), key=len, reverse=True)))
  )
  sentences = [
    line for text in texts for part in literal.split(text) if (line := " ".join(part.split()))
  ]
  if not sentences:
    raise ValueError("Cannot fit a SentencePiece model: the corpus has no text.")
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(sentences),
      model_writer=model,
      model_type="bpe",
      vocab_size=vocab_size,
      hard_vocab_limit=False,
      character_coverage=1.0,
      byte_fallback=False,
      normalization_rule_name="nmt_nfkc_cf",
      pad_id=0,
      unk_id=1,
      bos_id=2,
      eos_id=3,
      pad_piece=PAD,
      unk_piece=UNK,
      bos_piece=BOS,
      eos_piece=EOS,
      unk_surface=UNK,
      control_symbols=[MASK, *extra_tokens],
      num_threads=1,  # sums of several threads would depend on their order
      minloglevel=2,
    )
  except (RuntimeError, ValueError) as error:
    raise ValueError(
      f"Cannot fit a SentencePiece model of {vocab_size} tokens to "
      f"{len(sentences)} texts: {str(error).rpartition('] ')[2]}"
    ) from error
  tokenizer = SentencePieceTokenizer(model.getvalue())
  tokenizer.save(directory)
  return tokenizer


def location_names(bins: int) -> tuple[str, ...]:
  """Names of the extra tokens for boxes in a fitted tokenizer: one that begins a box, then one for each bin; () for 0 bins."""
  return ("<box>", *(f"<bin{i}>" for i in range(bins))) if bins else ()


_KINDS = {cls.kind: cls for cls in (WordPieceTokenizer, SentencePieceTokenizer)}


def load(directory) -> Tokenizer:
  """The tokenizer that `save` wrote.

  Raises:
    FileNotFoundError: no tokenizer there.
    ValueError: the files are damaged or were changed.
  """
  path = os.path.join(directory, CONFIG_FILE)
  try:
    config = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    cls, path_of_file = _KINDS[config["kind"]], os.path.join(directory, config["file"])
    options, fingerprint = config["options"], config["fingerprint"]
  except FileNotFoundError as error:
    raise FileNotFoundError(f"No tokenizer in {directory}: {path} does not exist.") from error
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is not a tokenizer description: {error!r}.") from error
  tokenizer = cls(path_of_file, **options)
  check_same(tokenizer, fingerprint, path)
  return tokenizer


def check_same(tokenizer: Tokenizer, fingerprint: str, where: str) -> None:
  """Raises ValueError if `tokenizer` is not the one whose fingerprint is recorded in `where`."""
  if tokenizer.fingerprint != fingerprint:
    raise ValueError(
      f"The tokenizer ({tokenizer.vocab_size} tokens, sha256 {tokenizer.fingerprint[:12]}) is "
      f"not the one recorded in {where} (sha256 {fingerprint[:12]}): use the files saved there."
    )


def pad_ids(
  rows: Sequence[Sequence[int]],
  length: int,
  pad_id: int,
  truncate: bool,
  ensure_eos: int | None = None,
) -> np.ndarray:
  """Stacks lists of ids into one array.

  Args:
    rows: N lists of ids.
    length: L, ids per row of the result.
    pad_id: fills rows that are shorter.
    truncate: cut longer rows to their first L ids; otherwise they are an error.
    ensure_eos: id that ends every row: appended where missing; a cut row gives up its last id for
      it. None: a cut row ends wherever it was cut, a final [SEP] included (the official way).

  Returns:
    i32[N, L].

  Raises:
    ValueError: a row is longer than L and `truncate` is false.
  """
  out = np.full((len(rows), length), pad_id, np.int32)
  for n, row in enumerate(rows):
    row = list(row)
    if ensure_eos is not None and (not row or row[-1] != ensure_eos):
      row.append(ensure_eos)
    if len(row) > length:
      if not truncate:
        raise ValueError(
          f"Row {n} has {len(row)} token ids, more than the {length} allowed; raise "
          "the length or allow truncation."
        )
      row = row[:length] if ensure_eos is None else [*row[: length - 1], ensure_eos]
    out[n, : len(row)] = row
  return out
