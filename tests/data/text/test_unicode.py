"""The one decoding of texts, and texts that are no valid Unicode."""

import codecs
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mplug_jax.data.text import sentencepiece, tokenizer, unicode, wordpiece
from tests.support import tiny_run

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "café", "\u2028"]
VOCABULARY = "".join(f"{token}\n" for token in TOKENS)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates too


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ANY_TEXT)
@example("cut emoji \ud83d")
@example("\ude00\ud83d")
def test_a_text_is_valid_if_it_can_be_encoded(text):
  try:
    text.encode()
    valid = True
  except UnicodeEncodeError:
    valid = False
  assert unicode.invalid_unicode(text) == (not valid)
  repaired = unicode.repaired(text)
  assert repaired == text if valid else unicode.REPLACEMENT in repaired
  assert len(repaired) == len(text)
  assert not unicode.invalid_unicode(repaired)
  assert unicode.printable(text).encode() == text.encode("utf-8", "backslashreplace")
  if not valid:
    assert unicode.problem(text).startswith("no valid Unicode (the lone surrogate \\ud")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.one_of(st.binary(max_size=12), st.text(max_size=12).map(str.encode)), st.booleans())
def test_bytes_are_decoded_or_the_first_wrong_one_is_named(data, mark):
  data = codecs.BOM_UTF8 * mark + data
  try:
    expected = data.decode("utf-8").removeprefix("\ufeff")
  except UnicodeDecodeError as error:
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    message = "UTF-16 or UTF-32 text; save it as UTF-8." if wide else f"(byte {error.start})."
    tiny_run.refused(lambda: unicode.decode(data, "x.txt"), "x.txt is ", message)
    return
  assert unicode.decode(data, "x.txt") == expected


def test_characters_that_are_valid_stay():
  for text in ("", "a\0b", "a\ufeffb", "\uffff", "\U0001f600", "\ufffd"):
    assert unicode.decode(text.encode(), "x") == text
    assert not unicode.invalid_unicode(text)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-32-be"])
def test_a_vocabulary_in_another_encoding_is_named(tmp_path, encoding):
  path = tmp_path / "vocab.txt"
  mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-32-be": codecs.BOM_UTF32_BE}.get(encoding, b"")
  path.write_bytes(mark + VOCABULARY.encode(encoding))
  message = f"{path} is UTF-16 or UTF-32 text; save it as UTF-8."
  tiny_run.refused(lambda: wordpiece.WordPieceTokenizer(path), message)
  path.write_bytes(VOCABULARY.encode("latin-1", "replace"))
  tiny_run.refused(
    lambda: wordpiece.WordPieceTokenizer(path), f"{path} is not UTF-8 text (byte 38)."
  )


def test_a_byte_order_mark_is_no_part_of_a_vocabulary(tmp_path):
  path = tmp_path / "vocab.txt"
  path.write_text(VOCABULARY, encoding="utf-8")
  plain = wordpiece.WordPieceTokenizer(path)
  path.write_text(VOCABULARY, encoding="utf-8-sig")
  marked = wordpiece.WordPieceTokenizer(path)
  assert marked.fingerprint == plain.fingerprint
  assert [marked.token_id(token) for token in TOKENS] == list(range(len(TOKENS)))
  assert marked.decode(marked.encode("Red")) == "red"
  content = json.dumps(json.loads(plain.to_json()))
  path.write_text(content, encoding="utf-8-sig")
  assert wordpiece.WordPieceTokenizer(path).fingerprint == plain.fingerprint
  path.write_text(content.replace('"red"', '"r\\ud83d"'))
  tiny_run.refused(
    lambda: wordpiece.WordPieceTokenizer(path),
    f"{path}: token 5 is no valid Unicode (the lone surrogate \\ud83d).",
  )
  plain.save(tmp_path / "saved")
  description = tmp_path / "saved" / "tokenizer_config.json"
  description.write_text(description.read_text(), encoding="utf-8-sig")
  assert tokenizer.load(tmp_path / "saved").fingerprint == plain.fingerprint


def test_tokenizers_name_the_text_that_they_cannot_encode(tmp_path):
  fitted = sentencepiece.train_sentencepiece(["a red cat", "a blue dog"], 60, tmp_path)
  for each in (fitted, wordpiece.WordPieceTokenizer(VOCABULARY.encode())):
    message = "'red \\ud83d' is no valid Unicode (the lone surrogate \\ud83d)."
    tiny_run.refused(lambda each=each: each.encode("red \ud83d"), message)
    assert each.encode("red \ufffd")[0] == each.bos_id
