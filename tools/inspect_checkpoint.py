"""Lists or compares checkpoints: `python -m tools.inspect_checkpoint PATH [OTHER]`.

A path may be a run folder, one checkpoint of it, a converted checkpoint, an Orbax directory, or
PyTorch weights. Values are read a few leaves at a time. Exit status: 0 listed or identical, 1
different, 2 after a one-line error on stderr.
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
    help="compare with this one: leaves in one alone, other shapes, values",
  )
  parser.add_argument(
    "--depth",
    type=int,
    default=0,
    help="show groups by so many components of the names; 0: every leaf",
  )
  parser.add_argument(
    "--match", default="", metavar="REGEX", help="only leaves in whose name it is found"
  )
  parser.add_argument(
    "--no_values", action="store_true", help="read no numbers: names, shapes and dtypes alone"
  )
  parser.add_argument(
    "--config",
    action="store_true",
    help="the run's whole config, not what differs from the defaults",
  )
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit status."""
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
          f"{which:<7} {source.kind} {path}"
          + (f", step {source.facts['step']}" if "step" in source.facts else "")
          for which, source, path in (
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
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
  sys.exit(main())
