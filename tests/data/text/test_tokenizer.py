"""Tokenizers: official WordPiece semantics, SentencePiece, saving, padding."""

import json
import pickle

import numpy as np
import pytest
import tokenizers

from mplug_jax.data.text import tokenizer as tokenizer_lib
from mplug_jax.data.text import wordpiece as wordpiece_lib
from tests.support.tokenizer_case import VOCAB


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("a man on horse.[SEP]", "[CLS] a man on horse . [SEP]"),
    ("a man on horse. [SEP] ", "[CLS] a man on horse . [SEP]"),
    ("", "[CLS]"),
    ("   \t\n", "[CLS]"),
    ("A MAN on Horses, riding!", "[CLS] a man on horse ##s , rid ##ing !"),
    ("[CLS] a[MASK]man[PAD]", "[CLS] [CLS] a [MASK] man [PAD]"),
    ("[sep]", "[CLS] [ sep ]"),  # only the exact spelling is special
    ("Café cafe\u0301 CAFÉ", "[CLS] cafe cafe cafe"),
    ("the中文s", "[CLS] the 中 文 s"),
    ("a zebra horsex man", "[CLS] a [UNK] [UNK] man"),
    ("a" * 101, "[CLS] [UNK]"),
    ("don't 10:30 t-shirt", "[CLS] don ' t 10 : 30 t - shirt"),
    ("a\u0000 \u200bman\ufffd\u00a0on", "[CLS] a man on"),  # control characters vanish
  ],
)
def test_wordpiece_encodes_like_the_official_tokenizer(wordpiece, text, expected):
  assert [VOCAB[i] for i in wordpiece.encode(text)] == expected.split()


def test_wordpiece_ids_come_from_names(wordpiece):
  assert wordpiece.vocab_size == len(VOCAB)
  ids = (wordpiece.pad_id, wordpiece.unk_id, wordpiece.bos_id, wordpiece.eos_id, wordpiece.mask_id)
  assert ids == tuple(map(VOCAB.index, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")))
  assert wordpiece.token_id("[unused7]") == VOCAB.index("[unused7]")
  with pytest.raises(ValueError, match=r"'<loc_1>' is not in .*vocab.txt"):
    wordpiece.token_id("<loc_1>")


@pytest.mark.parametrize(
  ("tokens", "expected"),
  [
    ("[CLS] a man on horse . [SEP] [PAD] [PAD]", "a man on horse."),
    ("[CLS] rid ##ing horse ##s , man ?", "riding horses, man?"),
    ("10 : 30 t - shirt", "10 : 30 t - shirt"),
    ("[CLS] don ' t ! [SEP]", "don't!"),
    ("a man ' s horse", "a man's horse"),
    ("[CLS] a [SEP] man [UNK] [MASK]", "a  man [UNK] [MASK]"),  # nothing is cut at [SEP]
    ("", ""),
  ],
)
def test_wordpiece_decodes_like_the_official_code(wordpiece, tokens, expected):
  ids = np.array([VOCAB.index(token) for token in tokens.split()], np.int32)
  assert wordpiece.decode(ids) == expected


def test_wordpiece_append_sep_is_an_option(vocab_file, wordpiece, tmp_path):
  with_sep = wordpiece_lib.WordPieceTokenizer(vocab_file, append_sep=True)
  assert with_sep.encode("a man") == [*wordpiece.encode("a man"), wordpiece.eos_id]
  assert with_sep.fingerprint != wordpiece.fingerprint
  with_sep.save(tmp_path / "saved")
  assert tokenizer_lib.load(tmp_path / "saved").encode("") == with_sep.encode("")


def test_vocabulary_errors_name_file_line_and_token(tmp_path):
  path = tmp_path / "vocab.txt"
  with pytest.raises(FileNotFoundError, match="vocab.txt does not exist"):
    wordpiece_lib.WordPieceTokenizer(path)
  path.write_text("")
  with pytest.raises(ValueError, match="vocab.txt is empty"):
    wordpiece_lib.WordPieceTokenizer(path)
  path.write_text("\n".join(VOCAB).replace("[MASK]", "mask"))
  with pytest.raises(ValueError, match=r"'\[MASK\]' is not in .*vocab.txt"):
    wordpiece_lib.WordPieceTokenizer(path)
  path.write_text("\n".join([*VOCAB, "man"]))
  with pytest.raises(ValueError, match=f"line {len(VOCAB) + 1}: token 'man' .* line 2"):
    wordpiece_lib.WordPieceTokenizer(path)


def test_vocabulary_with_windows_line_ends_and_exotic_separators(tmp_path):
  path = tmp_path / "vocab.txt"
  path.write_bytes("\r\n".join([*VOCAB, "\u2028", "\x85", "last"]).encode() + b"\r\n")
  tokenizer = wordpiece_lib.WordPieceTokenizer(path)
  assert tokenizer.vocab_size == len(VOCAB) + 3
  assert tokenizer.encode("last") == [tokenizer.bos_id, len(VOCAB) + 2]


def as_json(**changes):
  """Returns the tokenizer.json of Hugging Face's library for VOCAB, with `changes` to its parts."""
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordPiece({token: i for i, token in enumerate(VOCAB)}, unk_token="[UNK]")
  )
  backend.normalizer = tokenizers.normalizers.BertNormalizer()
  backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  backend.add_special_tokens(["[CLS]", "[SEP]", "[new]"])
  content = json.loads(backend.to_str())
  for name, value in changes.items():
    part, key = name.split("__")
    content[part][key] = value
  return json.dumps(content)


def test_tokenizer_json_gives_the_vocabulary(wordpiece, tmp_path):
  (tmp_path / "tokenizer.json").write_text(as_json())
  (tmp_path / "longer.txt").write_text("\n".join([*VOCAB, "[new]"]) + "\n")
  from_json, from_text = (
    wordpiece_lib.WordPieceTokenizer(tmp_path / name) for name in ("tokenizer.json", "longer.txt")
  )
  assert from_json.fingerprint == from_text.fingerprint
  assert from_json.token_id("[new]") == len(VOCAB)
  text = "A MAN on Horses, riding the中文s! [SEP]"
  assert (
    from_json.encode(text)
    == wordpiece.encode(text)
    == pickle.loads(pickle.dumps(from_json)).encode(text)
  )
  from_json.save(tmp_path / "saved")
  assert tokenizer_lib.load(tmp_path / "saved").fingerprint == from_json.fingerprint


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (
      as_json(normalizer__lowercase=False),
      "no uncased WordPiece tokenizer: normalizer.lowercase is False, and must be True",
    ),
    (as_json(normalizer__strip_accents=False), "keeps accents: normalizer.strip_accents is false"),
    (as_json(model__type="BPE"), "model.type is 'BPE', and must be 'WordPiece'"),
    (as_json(model__vocab={"a": 0, "b": 2}), "ids of its 5 tokens are not 0 to 4"),
    (as_json()[:-1], "neither a vocabulary nor a tokenizer.json"),
    (
      '{"model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}}',
      "normalizer.type is None",
    ),
    ("[1, 2]", "Token '.PAD.' is not in"),
  ],
)  # a vocabulary of one token
def test_other_tokenizer_json_is_an_error(text, message, tmp_path):
  (tmp_path / "tokenizer.json").write_text(text)
  with pytest.raises(ValueError, match=message):
    wordpiece_lib.WordPieceTokenizer(tmp_path / "tokenizer.json")
