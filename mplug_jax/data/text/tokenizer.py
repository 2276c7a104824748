"""Loads the saved tokenizers: WordPiece and SentencePiece.

Both read the literal strings "[CLS]", "[SEP]", "[MASK]", "[PAD]" and "[UNK]" inside a text as the
special tokens, with or without spaces around them. Ids are looked up by name.
"""

import json
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from mplug_jax.data.text import unicode
from mplug_jax.data.text.sentencepiece import SentencePieceTokenizer
from mplug_jax.data.text.tokenizer_base import CONFIG_FILE, FileTokenizer, check_same
from mplug_jax.data.text.wordpiece import WordPieceTokenizer
from mplug_jax.runtime import files

_KINDS: dict[str, type[FileTokenizer]] = {
  cls.kind: cls for cls in (WordPieceTokenizer, SentencePieceTokenizer)
}


def load(directory: str | os.PathLike[str]) -> FileTokenizer:
  """Loads the tokenizer that `save` wrote.

  Args:
    directory: folder of the tokenizer.

  Raises:
    FileNotFoundError: there is no tokenizer in the folder.
    ValueError: the files are damaged or were changed.
  """
  path = os.path.join(directory, CONFIG_FILE)
  try:
    config = json.loads(unicode.decode(files.open_path(path).read_bytes(), path))
    cls = _KINDS[config["kind"]]
    path_of_file = os.path.join(directory, config["file"])
    options = config["options"]
    fingerprint = config["fingerprint"]
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
) -> Int32[np.ndarray, "rows {length}"]:
  """Stacks lists of ids into one array.

  Args:
    rows: lists of ids.
    length: ids per row of the result.
    pad_id: fills shorter rows.
    truncate: cuts longer rows to their first `length` ids; otherwise they are an error.
    ensure_eos: id that ends every row: appended if missing; in a cut row it replaces the last id.
      None: a cut row loses its end, a final [SEP] included, as in the official code.

  Raises:
    ValueError: a row is longer than `length` and `truncate` is false.
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
