"""Runs a trained model on images and texts.

    python -m mplug_jax.predict --checkpoint=runs/vqa --task=vqa --image=dog.jpg --question="..."

Rows come from --image, from a folder (--images) or from a JSONL file (--input) with the keys that
--help lists. Rows without a text use --text; --question is the same flag. Image names in a file are
relative to its folder.

The command writes every row to --output or stdout as one JSON line when its batch is done: the row
with its result, or with the reason for the failure as "error". Keys of the rows are kept: if rows
have an "answer" already, the result is "predicted_answer". The same command, run again, continues
after the lines of --output, which is described in OUTPUT.job.json; any other existing file is
refused. At the end it prints the number of failed rows.
Exit status: 0; 1 if nothing can be computed, or with --strict if a row failed.
"""

import argparse
import signal
import sys
from collections.abc import Sequence

from mplug_jax.inference import methods, predict_rows


def _keys_help() -> str:
  """Returns the keys of a row for each value of --task."""
  lines = ["Keys of a row, by --task:"]
  for name, method in methods.commands().items():
    command = methods.METHODS[method].command
    assert command is not None
    keys = (" or " if command.either else ", ").join(filter(None, (command.image, command.text)))
    lines.append(f"  {name}: {keys}")
  return "\n".join(lines)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m mplug_jax.predict",
    description=__doc__,
    epilog=_keys_help(),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add(
    "--checkpoint",
    required=True,
    help="run folder, local or gs://bucket/run, or output of tools.convert_checkpoint",
  )
  add("--task", required=True, choices=methods.commands())
  add("--config", help="configs/vqa.py:base, for converted weights; default: the run's")
  add("--tokenizer", help="vocab.txt, for converted weights; default: the run's")
  add(
    "--image",
    action="append",
    default=[],
    help="one image or video; given twice, the pair of nlvr2",
  )
  add("--images", metavar="DIR", help="all images under a folder")
  add("--input", metavar="FILE", help="JSONL file of rows")
  add("--text", "--question", help="question, phrase, statement or caption for rows without one")
  add("--prompt", help="beginning of every caption")
  add("--n", type=int, default=1, help="captions per image")
  add("--output", metavar="FILE", help="JSONL file of results; default: stdout")
  add("--batch_size", type=int, default=0, help="rows per batch; default: config.eval.batch_size")
  add("--truncate", action="store_true", help="cut texts that are too long instead of failing")
  add(
    "--explain",
    metavar="DIR",
    help="write an attention map for every row, see mplug_jax/inference/explain.py",
  )
  add("--strict", action="store_true", help="exit status 1 if a row has no result")
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit status."""
  options = _parse(argv)
  try:
    return predict_rows.run(options)
  except (ValueError, OSError, RuntimeError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the command without a traceback
  sys.exit(main())
