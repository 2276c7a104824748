"""Fits a SentencePiece model to the training texts of one or several configs, for runs that shall share it.

    python -m tools.train_sentencepiece --config=configs/caption.py:data=jsonl,root=/my/captions \\
        --config=configs/vqa.py:data=jsonl,root=/my/questions --vocab_size=8000 --out=tokenizer

A run fits one to its own texts when it is given none. Out of this one it reads

    --config.tokenizer.kind=sentencepiece --config.tokenizer.path=tokenizer/tokenizer.model

Special tokens have the ids of every tokenizer here, those for boxes (--locations, config.task.bins + 1) come behind them. Reported are
the length of the texts in tokens, and, with --held_out, the share of tokens of the configs' evaluated splits that the model does not
know. Exit status: 0 written; 1 and one sentence, nothing written.
"""

import argparse
import os
import sys

import numpy as np

from mplug_jax import config as config_lib
from mplug_jax import data
from mplug_jax.data.text import sentencepiece, tokenizer_base

_PERCENTILES = (50, 90, 99)


def _parse(argv):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--config",
    action="append",
    required=True,
    metavar="FILE[:ARGUMENT]",
    help="whose training texts; may be repeated",
  )
  parser.add_argument(
    "--out",
    required=True,
    metavar="FOLDER",
    help="written to: tokenizer.model and tokenizer_config.json",
  )
  parser.add_argument(
    "--vocab_size",
    type=int,
    default=8000,
    help="upper bound of its tokens, special and location tokens included",
  )
  parser.add_argument("--locations", type=int, default=0, help="tokens for box coordinates")
  parser.add_argument(
    "--records", type=int, default=0, help="training records of each config, evenly spaced; 0: all"
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
  if os.path.exists(os.path.join(options.out, tokenizer_base.CONFIG_FILE)):
    parser.error(f"--out={options.out} holds a tokenizer already; choose another folder.")
  return options


def _texts(config, split, records):
  """The texts of a split."""
  config = config.copy_and_resolve_references().unlock()
  config.tokenizer.records = records
  return data.texts(config, data.get_source(config, split))


def _measure(tokenizer, texts):
  """(tokens of each text without the first, unknown ones among them)."""
  lengths, unknown = [], 0
  for text in texts:
    ids = tokenizer.encode(text)[1:]
    lengths.append(len(ids))
    unknown += ids.count(tokenizer.unk_id)
  return np.array(lengths), unknown


def main(argv=None):
  """Returns the exit status."""
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
  print(
    f"use it: --config.tokenizer.kind=sentencepiece --config.tokenizer.path={os.path.join(options.out, 'tokenizer.model')}"
  )
  return 0


if __name__ == "__main__":
  sys.exit(main())
