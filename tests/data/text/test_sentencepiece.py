"""SentencePiece tokenizers."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from mplug_jax.data.text import sentencepiece as sentencepiece_lib
from mplug_jax.data.text import tokenizer as tokenizer_lib
from mplug_jax.data.text import tokenizer_base
from tests.support.tokenizer_case import CORPUS, LOCATIONS, VOCAB


def test_sentencepiece_round_trip_and_special_ids(sentencepiece):
  for text in CORPUS:
    ids = sentencepiece.encode(text)
    assert ids[0] == sentencepiece.bos_id
    assert sentencepiece.unk_id not in ids
    assert sentencepiece.decode(ids) == text.lower()
    assert sentencepiece.encode(text.upper()) == ids
  assert sentencepiece.encode("") == sentencepiece.encode("  ") == [sentencepiece.bos_id]
  special = [sentencepiece.token_id(name) for name in tokenizer_base.SPECIAL_TOKENS]
  assert len(set(special)) == 5
  assert max(special) < sentencepiece.vocab_size <= 1000


def test_sentencepiece_keeps_whole_words_of_a_small_corpus(sentencepiece):
  for text in CORPUS:
    words = text.replace("?", " ?").split()
    assert len(sentencepiece.encode(text)) == 1 + len(words), text


def test_sentencepiece_reads_literal_special_tokens(sentencepiece):
  t = sentencepiece
  red = t.encode("red")[1:]
  yes = t.encode("yes")[1:]
  assert t.encode("red[SEP]") == t.encode(" RED [SEP] ") == [t.bos_id, *red, t.eos_id]
  assert t.encode("red [SEP] yes") == t.encode("red[SEP]yes") == [t.bos_id, *red, t.eos_id, *yes]
  assert t.encode("[CLS][MASK][PAD][UNK]")[1:] == [t.bos_id, t.mask_id, t.pad_id, t.unk_id]
  assert t.eos_id not in t.encode("[sep]")


def test_sentencepiece_decode_drops_padding_and_ends_only(sentencepiece):
  t = sentencepiece
  ids = [*t.encode("red[SEP]"), t.pad_id, t.eos_id]
  assert t.decode(np.array(ids, np.int32)) == "red"
  assert t.decode(t.encode("red [SEP] yes [MASK] <loc_12>")) == "red yes [MASK] <loc_12>"
  assert t.decode(t.encode("the 中 circle")) == "the [UNK] circle"
  assert t.decode([]) == t.decode([t.bos_id, t.eos_id]) == ""


def test_extra_tokens_have_consecutive_ids_and_are_read_whole(sentencepiece):
  ids = [sentencepiece.token_id(name) for name in LOCATIONS]
  assert ids == list(range(ids[0], ids[0] + 337))
  text = "red<loc_1><loc_12> <loc_123>"
  assert sentencepiece.encode(text)[-3:] == [ids[1], ids[12], ids[123]]
  # The longest of several that fit.
  assert sentencepiece.encode("<x><x")[1:] == [ids[-1] + 2, ids[-1] + 1]


_TRAIN = """
import sys
from mplug_jax.data.text import sentencepiece
print(sentencepiece.train_sentencepiece(sys.stdin, 60, sys.argv[1]).fingerprint)
"""


def test_training_is_deterministic_across_processes(tmp_path):
  prints = [
    subprocess.run(
      [sys.executable, "-c", _TRAIN, str(tmp_path / name)],
      text=True,
      input="\n".join(CORPUS),
      capture_output=True,
      check=True,
    ).stdout.strip()
    for name in "ab"
  ]
  here = sentencepiece_lib.train_sentencepiece(iter(CORPUS), 60, tmp_path / "c")
  assert prints == [here.fingerprint] * 2
  assert here.vocab_size <= 60
  other = sentencepiece_lib.train_sentencepiece(CORPUS[:-1], 60, tmp_path / "d")
  assert other.fingerprint != here.fingerprint


def test_training_ignores_special_tokens_and_reports_bad_corpora(tmp_path):
  plain = sentencepiece_lib.train_sentencepiece(CORPUS, 60, tmp_path / "a")
  marked = sentencepiece_lib.train_sentencepiece([f"{x} [SEP]" for x in CORPUS], 60, tmp_path / "b")
  assert plain.fingerprint == marked.fingerprint
  with pytest.raises(ValueError, match="the corpus has no text"):
    sentencepiece_lib.train_sentencepiece(["", " [SEP]"], 60, tmp_path / "c")
  with pytest.raises(ValueError, match="Cannot fit a SentencePiece model of 10 tokens to 17 texts"):
    sentencepiece_lib.train_sentencepiece(CORPUS, 10, tmp_path / "c")
  assert not (tmp_path / "c").exists()


def test_a_broken_model_file(tmp_path):
  path = tmp_path / "tokenizer.model"
  path.write_bytes(b"junk")
  with pytest.raises(ValueError, match="tokenizer.model is not a SentencePiece model"):
    sentencepiece_lib.SentencePieceTokenizer(path)


@pytest.mark.parametrize("name", ["wordpiece", "sentencepiece"])
def test_save_load_and_pickle_keep_everything(name, request, tmp_path):
  tokenizer = request.getfixturevalue(name)
  tokenizer.save(tmp_path / "one")
  tokenizer.save(tmp_path / "one")  # over an older one
  loaded = tokenizer_lib.load(tmp_path / "one")
  loaded.save(tmp_path / "two")
  again = tokenizer_lib.load(tmp_path / "two")
  assert len(os.listdir(tmp_path / "two")) == 2  # no temporary files
  for other in (loaded, again, pickle.loads(pickle.dumps(tokenizer))):
    assert type(other) is type(tokenizer)
    assert other.fingerprint == tokenizer.fingerprint
    assert other.vocab_size == tokenizer.vocab_size
    for text in ("a man on horse.[SEP]", "Is the circle red?"):
      assert other.encode(text) == tokenizer.encode(text)


def test_encode_returns_a_new_list(wordpiece):
  wordpiece.encode("a man").append(99)
  assert 99 not in wordpiece.encode("a man")


def test_load_of_missing_damaged_and_exchanged_files(tmp_path, wordpiece):
  with pytest.raises(FileNotFoundError, match="No tokenizer in"):
    tokenizer_lib.load(tmp_path / "nowhere")
  directory = tmp_path / "saved"
  wordpiece.save(directory)
  vocab = directory / "vocab.txt"
  vocab.write_text(vocab.read_text() + "more\n")
  with pytest.raises(ValueError, match="is not the one recorded in .*tokenizer_config.json"):
    tokenizer_lib.load(directory)
  vocab.unlink()
  with pytest.raises(FileNotFoundError, match="vocab.txt does not exist"):
    tokenizer_lib.load(directory)
  config = directory / tokenizer_base.CONFIG_FILE
  for content in ("{", "[]", json.dumps({"kind": "bpe", "file": "x", "options": {}})):
    config.write_text(content)
    with pytest.raises(ValueError, match="tokenizer_config.json is not a tokenizer description"):
      tokenizer_lib.load(directory)


def test_failed_save_keeps_the_old_files(tmp_path, wordpiece):
  wordpiece.save(tmp_path / "saved")
  script = f"""
import resource, signal
from mplug_jax.data.text import tokenizer
bigger = tokenizer.WordPieceTokenizer({str(tmp_path / "bigger.txt")!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
bigger.save({str(tmp_path / "saved")!r})
"""
  words = "\n".join([*VOCAB, *(f"word{i}" for i in range(1000))])
  (tmp_path / "bigger.txt").write_text(words)
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
  assert done.returncode == 1
  assert "File too large" in done.stderr
  assert tokenizer_lib.load(tmp_path / "saved").fingerprint == wordpiece.fingerprint
  assert len(os.listdir(tmp_path / "saved")) == 2


def test_check_same_names_the_place(wordpiece, sentencepiece):
  tokenizer_base.check_same(wordpiece, wordpiece.fingerprint, "run/checkpoints/10")
  with pytest.raises(ValueError, match="not the one recorded in run/checkpoints/10"):
    tokenizer_base.check_same(sentencepiece, wordpiece.fingerprint, "run/checkpoints/10")


def test_pad_ids():
  pad = tokenizer_lib.pad_ids
  out = pad([[5, 6, 7], [], [8]], 4, 9, truncate=False)
  np.testing.assert_array_equal(out, [[5, 6, 7, 9], [9, 9, 9, 9], [8, 9, 9, 9]])
  assert out.dtype == np.int32
  np.testing.assert_array_equal(pad([[5, 6, 7]], 2, 9, truncate=True), [[5, 6]])
  assert pad([], 3, 0, truncate=False).shape == (0, 3)
  with pytest.raises(ValueError, match="Row 1 has 3 token ids, more than the 2 allowed"):
    pad([[1], [1, 2, 3]], 2, 0, truncate=False)


def test_pad_ids_ensure_eos():
  rows = [[5, 6], [5, 1], [5, 6, 7], [5, 6, 7, 1], [5, 6, 7, 8, 9]]
  out = tokenizer_lib.pad_ids(rows, 4, 0, truncate=True, ensure_eos=1)
  np.testing.assert_array_equal(
    out, [[5, 6, 1, 0], [5, 1, 0, 0], [5, 6, 7, 1], [5, 6, 7, 1], [5, 6, 7, 1]]
  )
  with pytest.raises(ValueError, match="Row 0 has 4 token ids"):  # eos counts
    tokenizer_lib.pad_ids([[5, 6, 7]], 3, 0, truncate=False, ensure_eos=1)
