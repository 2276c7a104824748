"""SentencePiece tokenizer, and its training on the texts of a run."""

import io
import os
import re
from collections.abc import Iterable, Sequence

import sentencepiece

from mplug_jax.data.text.tokenizer_base import (
  BOS,
  EOS,
  MASK,
  PAD,
  SPECIAL_TOKENS,
  UNK,
  FileTokenizer,
)


class SentencePieceTokenizer(FileTokenizer):
  """A SentencePiece model that has the pieces [PAD], [UNK], [CLS], [SEP] and [MASK].

  Control symbols of the model ([MASK], extra tokens) are read literally inside texts too.

  Args:
    source: path of a .model file, or its bytes.
  """

  kind = "sentencepiece"
  file_name = "tokenizer.model"

  def _build(self) -> None:
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=self._data)
    except (RuntimeError, ValueError, OSError) as error:
      raise ValueError(f"{self._origin} is not a SentencePiece model.") from error
    self.vocab_size = len(self._model)
    literal = {
      self._model.id_to_piece(i) for i in range(self.vocab_size) if self._model.is_control(i)
    } | set(SPECIAL_TOKENS)
    # Longest first, so that "<loc_12>" never loses to a token it starts with.
    names = sorted(literal, key=len, reverse=True)
    self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")").split
    # Tokens that decode writes; the model decodes [UNK], because it knows the spaces around it.
    self._literal = {
      self._lookup(name): "" if name in (PAD, BOS, EOS) else name for name in names if name != UNK
    }

  def _lookup(self, name: str) -> int | None:
    piece_id = self._model.piece_to_id(name)  # the unknown id for an unknown piece
    return piece_id if self._model.id_to_piece(piece_id) == name else None

  def _encode(self, text: str) -> tuple[int, ...]:
    ids = [self.bos_id]
    # Every second part is a literal token. The model would make a piece of the space before it.
    for i, part in enumerate(self._split(text)):
      ids += [self.token_id(part)] if i % 2 else self._model.encode(part)
    return tuple(ids)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids, with [MASK], [UNK] and extra tokens.

    Args:
      ids: token ids.
    """
    parts = []
    run = []
    for i in (*map(int, ids), self.pad_id):  # the pad at the end flushes the last run
      if i not in self._literal:
        run.append(i)
        continue
      parts += [self._model.decode(run), self._literal[i]]
      run = []
    return " ".join(part for part in parts if part)


def train_sentencepiece(
  texts: Iterable[str],
  vocab_size: int,
  directory: str | os.PathLike[str],
  extra_tokens: Sequence[str] = (),
) -> SentencePieceTokenizer:
  """Fits a lower-casing BPE model to texts and saves it; the same texts give the same model.

  On a corpus of few distinct sentences BPE keeps whole words, which a unigram model breaks up:
  sequences are half as long.

  Args:
    texts: the corpus; literal special tokens in it are ignored.
    vocab_size: upper bound, special and extra tokens included; a small corpus gives fewer.
    directory: folder that `tokenizer.load` reads.
    extra_tokens: names of further special tokens (e.g. locations), ids from 5 in this order.

  Raises:
    ValueError: there is no text, or the corpus has more characters than vocab_size allows.
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
  """Returns the names of the extra tokens for boxes in a fitted tokenizer.

  Args:
    bins: number of bins.

  Returns:
    A token that begins a box, then one per bin; () for 0 bins.
  """
  return ("<box>", *(f"<bin{i}>" for i in range(bins))) if bins else ()
