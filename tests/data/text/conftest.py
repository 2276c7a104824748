"""Tokenizers that the tests of texts share."""

import pytest

from mplug_jax.data.text import sentencepiece as sentencepiece_lib
from mplug_jax.data.text import wordpiece as wordpiece_lib
from tests.support.tokenizer_case import CORPUS, LOCATIONS, VOCAB


@pytest.fixture
def vocab_file(tmp_path):
  path = tmp_path / "vocab.txt"
  path.write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
  return path


@pytest.fixture
def wordpiece(vocab_file):
  return wordpiece_lib.WordPieceTokenizer(vocab_file)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
  return sentencepiece_lib.train_sentencepiece(
    CORPUS, 1000, tmp_path_factory.mktemp("tokenizer"), extra_tokens=[*LOCATIONS, "<x", "<x>"]
  )
