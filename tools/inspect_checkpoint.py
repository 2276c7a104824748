"""Shows or compares checkpoints: `python -m tools.inspect_checkpoint PATH [OTHER]`.

A path may be a run folder, one checkpoint of it, a converted checkpoint, an Orbax directory, or
PyTorch weights. Values are read a few leaves at a time. Exit status: 0 (with OTHER: identical),
1 different, 2 after one sentence on stderr.
"""

import argparse
import contextlib
import signal
import sys
from collections.abc import Sequence

from mplug_jax.checkpoints import errors
from mplug_jax.conversion.inspect import report
from mplug_jax.conversion.inspect.tensors import open_leaves


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("path", metavar="PATH")
  parser.add_argument(
    "other",
    metavar="OTHER",
    nargs="?",
    help="compare with this checkpoint: leaves in only one, other shapes, values",
  )
  parser.add_argument(
    "--depth",
    type=int,
    default=0,
    help="group leaves by this number of name components; 0: show every leaf",
  )
  parser.add_argument(
    "--match", default="", metavar="REGEX", help="show only leaves whose name matches this regex"
  )
  parser.add_argument(
    "--no_values", action="store_true", help="read no values, only names, shapes and dtypes"
  )
  parser.add_argument(
    "--config",
    action="store_true",
    help="show the run's complete config, not only the differences from the defaults",
  )
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the tool; returns the exit status."""
  options = _parse(argv)
  values = not options.no_values
  try:
    with contextlib.ExitStack() as stack:
      first = stack.enter_context(open_leaves(options.path))
      if options.other is None:
        lines = report.facts(first, options.path, options.config)
        names = report.selected(first.leaves, options.match)
        lines += ["", *report.tree(first, names, options.depth, values)]
        status = 0
      else:
        second = stack.enter_context(open_leaves(options.other))
        lines = [
          f"{title:<7} {source.kind} {path}"
          + (f", step {source.facts['step']}" if "step" in source.facts else "")
          for title, source, path in (
            ("first", first, options.path),
            ("second", second, options.other),
          )
        ]
        differences, identical = report.compare(first, second, options.match, options.depth, values)
        lines += ["", *differences]
        status = 0 if identical else 1
  except (ValueError, OSError, ImportError, errors.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print("\n".join(lines))
  return status


if __name__ == "__main__":
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends it quietly
  sys.exit(main())
