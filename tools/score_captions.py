"""Scores captions against references.

    python -m tools.score_captions RESULTS.json ANNOTATIONS.json [--metrics CIDEr-D ...]

RESULTS is a list [{"image_id", "caption"}] in the format of COCO results, ANNOTATIONS
{"images", "annotations"} in the format of COCO captions. If images have a "domain" (NoCaps:
in-domain, near-domain, out-domain), each domain is also evaluated. Values are percentages;
"CIDEr-D" is what papers call CIDEr. METEOR and SPICE need Java and `pip install pycocoevalcap`;
without them, the reason is printed instead. Exit status: 0 scores were printed; 2 the files could
not be read or do not match, or --json could not be written.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mplug_jax.data.storage import json_values
from mplug_jax.data.text import unicode
from mplug_jax.metrics import captioning
from mplug_jax.runtime import atomic_files, files


def _read(path: str) -> Any:
  """Reads JSON; raises ValueError for another format, OSError for an unreadable file."""
  with open(path, "rb") as file:
    text = unicode.decode(file.read(), path)
  parser = json_values.Parser()
  try:
    value = parser.decode(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: not a JSON file ({error}).") from error
  return json_values.Checks().file(value, path) if parser.suspicious else value


def _print_table(scores: Mapping[str, Mapping[str, float | str]]) -> None:
  """Prints a line per metric, a column per domain, then the metrics that were not computed."""
  columns = [["", *next(iter(scores.values()))]]
  notes: list[str] = []
  for name, values in scores.items():
    columns.append(
      [name, *("-" if isinstance(value, str) else f"{value:.2f}" for value in values.values())]
    )
    notes = notes or [
      f"{metric}: {value}" for metric, value in values.items() if isinstance(value, str)
    ]
  widths = [max(map(len, column)) for column in columns]
  for first, *rest in zip(*columns):
    print(
      "  ".join(
        [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(rest, widths[1:]))]
      )
    )
  print(*notes, sep="\n", end="\n" if notes else "")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("results", metavar="RESULTS.json")
  parser.add_argument("annotations", metavar="ANNOTATIONS.json")
  parser.add_argument(
    "--metrics",
    nargs="+",
    metavar="NAME",
    choices=captioning.ALL,
    default=captioning.DEFAULT,
    help=f"some of {', '.join(captioning.ALL)}; default: {', '.join(captioning.DEFAULT)}",
  )
  parser.add_argument(
    "--partial",
    action="store_true",
    help="evaluate only the images that have a result, instead of requiring all",
  )
  parser.add_argument("--json", default="", metavar="FILE", help="file for the scores")
  parser.add_argument("--overwrite", action="store_true", help="replace existing files")
  options = parser.parse_args(argv)
  try:
    files.require_new(options.json, options.overwrite)
    scores = captioning.score_domains(
      _read(options.results), _read(options.annotations), options.metrics, options.partial
    )
  except (ValueError, OSError) as error:
    print(error, file=sys.stderr)
    return 2
  _print_table(scores)
  if options.json:
    try:
      atomic_files.write_json(options.json, scores)
    except OSError as error:
      print(f"The scores could not be written: {error}.", file=sys.stderr)
      return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
