r"""Fits a SentencePiece model to the training texts of one or several configs, to share it.

    python -m tools.train_sentencepiece --config=configs/caption.py:data=jsonl,root=/my/captions \
        --config=configs/vqa.py:data=jsonl,root=/my/questions --vocab_size=8000 --out=tokenizer

A run without a tokenizer fits one to its texts. To use this one instead:

    --config.tokenizer.kind=sentencepiece --config.tokenizer.path=tokenizer/tokenizer.model

Special tokens have the same ids as in all tokenizers of this package; tokens for boxes
(--locations, config.task.bins + 1) follow them. The command reports the length of the texts in
tokens and, with --held_out, how many tokens of the configs' evaluated splits are unknown to the
model. Exit status: 0 written; 1 after a one-line error, nothing written.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from mplug_jax import config as config_lib
from mplug_jax import data
from mplug_jax.data.text import sentencepiece, tokenizer_base

_PERCENTILES = (50, 90, 99)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--config",
    action="append",
    required=True,
    metavar="FILE[:ARGUMENT]",
    help="config of the training texts; may be repeated",
  )
  parser.add_argument(
    "--out",
    required=True,
    metavar="FOLDER",
    help="folder for tokenizer.model and tokenizer_config.json",
  )
  parser.add_argument(
    "--vocab_size",
    type=int,
    default=8000,
    help="maximum number of tokens, including special and location tokens",
  )
  parser.add_argument("--locations", type=int, default=0, help="tokens for box coordinates")
  parser.add_argument(
    "--records",
    type=int,
    default=0,
    help="number of training records per config, evenly spaced; 0: all",
  )
  parser.add_argument(
    "--held_out",
    action="store_true",
    help="report how many tokens of the evaluated splits are unknown",
  )
  options = parser.parse_args(argv)
  for name, least in (("vocab_size", 1), ("locations", 0), ("records", 0)):
    if getattr(options, name) < least:
      parser.error(f"--{name}={getattr(options, name)} must be at least {least}.")
  names = (tokenizer_base.CONFIG_FILE, sentencepiece.SentencePieceTokenizer.file_name)
  if any(os.path.exists(os.path.join(options.out, name)) for name in names):
    parser.error(f"--out={options.out} already contains a tokenizer; choose another folder.")
  return options


def _texts(config: config_lib.Config, split: str, records: int) -> Iterable[str]:
  """Returns the texts of a split; records: number of records to read, 0 for all."""
  config = config.copy_and_resolve_references().unlock()
  config.tokenizer.records = records
  return data.texts(config, data.get_source(config, split))


def _measure(tokenizer: tokenizer_base.Tokenizer, texts: Iterable[str]) -> tuple[np.ndarray, int]:
  """Returns the tokens per text, without the first token, and the number of unknown tokens."""
  lengths = []
  unknown = 0
  for text in texts:
    ids = tokenizer.encode(text)[1:]
    lengths.append(len(ids))
    unknown += ids.count(tokenizer.unk_id)
  return np.array(lengths), unknown


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit status."""
  options = _parse(argv)
  try:
    configs = [config_lib.load(name) for name in options.config]
    texts = [text for config in configs for text in _texts(config, "train", options.records)]
    held_out = [
      list(_texts(config, config.eval.split, options.records))
      for config in configs
      if options.held_out
    ]
    tokenizer = sentencepiece.train_sentencepiece(
      texts, options.vocab_size, options.out, sentencepiece.location_names(options.locations)
    )
    print(f"{tokenizer.vocab_size:,} tokens, {len(texts):,} texts")
    lengths, _ = _measure(tokenizer, texts)
    print(
      "tokens of a text: "
      + ", ".join(
        f"{p}% have at most {n}"
        for p, n in zip(_PERCENTILES, np.percentile(lengths, _PERCENTILES, method="inverted_cdf"))
      )
      + f", the longest has {lengths.max()}"
    )
    for name, config, texts in zip(options.config, configs, held_out):
      lengths, unknown = _measure(tokenizer, texts)
      print(f"{name}, {config.eval.split}: {unknown:,} of {lengths.sum():,} tokens are unknown")
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  path = os.path.join(options.out, "tokenizer.model")
  print(f"use it: --config.tokenizer.kind=sentencepiece --config.tokenizer.path={path}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
