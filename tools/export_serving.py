"""Exports a checkpoint as programs for servers: `python -m tools.export_serving runs/vqa served`.

The format is documented in mplug_jax/inference/serving/export.py.
"""

import argparse
import sys
from collections.abc import Sequence

from mplug_jax import Predictor, tune_process
from mplug_jax.checkpoints import errors
from mplug_jax.inference import methods
from mplug_jax.inference.serving import export


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("checkpoint", help="run folder, or output of tools.convert_checkpoint")
  parser.add_argument("dest", help="folder to create")
  parser.add_argument("--config", help="FILE:ARGUMENT, for weights without a stored config")
  parser.add_argument("--tokenizer", help="vocab.txt of converted weights")
  parser.add_argument(
    "--functions",
    default="",
    help=f"of {','.join(methods.functions())}; default: all that the checkpoint supports",
  )
  parser.add_argument(
    "--platforms", default=",".join(export.PLATFORMS), help="default: %(default)s"
  )
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit status: 0, or 1 after a one-line error on stderr."""
  options = _parse(argv)
  names, platforms = (
    tuple(filter(None, text.split(","))) for text in (options.functions, options.platforms)
  )
  tune_process()
  try:
    about = export.export(
      Predictor.load(options.checkpoint, options.config, options.tokenizer),
      options.dest,
      names,
      platforms,
    )
  except (ValueError, OSError, ImportError, errors.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  for name, function in about["functions"].items():
    shapes = (
      f"{key} {x['dtype']}[{', '.join(map(str, x['shape']))}]"
      for key, x in function["inputs"].items()
    )
    print(f"{name}({', '.join(shapes)}) -> {', '.join(function['outputs'])}")
  print(f"{options.dest}: run it with `python {options.dest}/serve.py`")
  return 0


if __name__ == "__main__":
  sys.exit(main())
