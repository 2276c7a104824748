"""Tokenizers behind one small protocol: WordPiece over a vocabulary file or a tokenizer.json, and SentencePiece.

Both read the literal strings "[CLS]", "[SEP]", "[MASK]", "[PAD]" and "[UNK]" inside a text as the
special tokens, with or without spaces around them. Ids are looked up by name.
"""

import json
import os
from collections.abc import Sequence

import numpy as np

from mplug_jax.data.text.sentencepiece import SentencePieceTokenizer
from mplug_jax.data.text.tokenizer_base import CONFIG_FILE, Tokenizer, check_same
from mplug_jax.data.text.wordpiece import WordPieceTokenizer
from mplug_jax.runtime import files

_KINDS = {cls.kind: cls for cls in (WordPieceTokenizer, SentencePieceTokenizer)}


def load(directory) -> Tokenizer:
  """The tokenizer that `save` wrote.

  Raises:
    FileNotFoundError: no tokenizer there.
    ValueError: the files are damaged or were changed.
  """
  path = os.path.join(directory, CONFIG_FILE)
  try:
    config = json.loads(files.open_path(path).read_text(encoding="utf-8"))
    cls, path_of_file = _KINDS[config["kind"]], os.path.join(directory, config["file"])
    options, fingerprint = config["options"], config["fingerprint"]
  except FileNotFoundError as error:
    raise FileNotFoundError(f"No tokenizer in {directory}: {path} does not exist.") from error
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is not a tokenizer description: {error!r}.") from error
  tokenizer = cls(path_of_file, **options)
  check_same(tokenizer, fingerprint, path)
  return tokenizer


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
