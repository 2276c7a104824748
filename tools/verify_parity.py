"""Compares this model with recordings of the official code.

    python -m tools.verify_parity RECORDING.npz [...] [--json=FILE]

Converts the weights of each file, computes every recorded result and prints a table. Exit status: 0
all results agree; 1 some differ; 2 a file cannot be checked, or --json cannot be written.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from mplug_jax import parity
from mplug_jax.runtime import atomic_files, files, process

_COLUMNS = ("verdict", "output", "shape", "max error", "relative", "tolerance", "note")


def _number(x: float) -> str:
  return f"{x:.1e}" if math.isfinite(x) else "-"


def _print_table(report: parity.Report) -> None:
  """Prints an aligned line per row, then the results that were not compared."""
  lines = [
    _COLUMNS,
    *(
      (
        "ok" if row.passed else "FAIL",
        row.name,
        "x".join(map(str, row.shape)) or "scalar",
        _number(row.error),
        _number(row.relative),
        _number(row.tolerance),
        row.note,
      )
      for row in report.rows
    ),
  ]
  widths = [max(map(len, column)) for column in zip(*lines)]
  for line in lines:
    print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
  for name, why in report.skipped.items():
    print(f"skipped: {name} ({why})")
  print("not checked:", ", ".join(report.unchecked) or "nothing")


def _as_json(path: str, report: parity.Report, seconds: float) -> dict[str, Any]:
  rows = [
    row._asdict()
    | {
      name: getattr(row, name) if math.isfinite(getattr(row, name)) else None
      for name in ("error", "relative")
    }
    for row in report.rows
  ]
  return {
    "file": path,
    "task": report.task,
    "seconds": round(seconds, 1),
    "rows": rows,
    "skipped": report.skipped,
    "not_checked": report.unchecked,
  }


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("recordings", nargs="+", metavar="RECORDING.npz")
  parser.add_argument("--json", default="", metavar="FILE", help="file for the rows")
  parser.add_argument("--overwrite", action="store_true", help="replace existing files")
  options = parser.parse_args(argv)
  try:
    files.require_new(options.json, options.overwrite)
  except FileExistsError as e:
    print(e)
    return 2
  status = 0
  results: list[dict[str, Any]] = []
  for path in options.recordings:
    start = time.perf_counter()
    try:
      report = parity.verify(path)
    except parity.Unusable as e:
      print(e)
      status = 2
      results.append({"file": path, "error": str(e)})
      continue
    seconds = time.perf_counter() - start
    print(f"\n{path}: {report.task}")
    _print_table(report)
    print(
      f"{path}: {len(report.rows)} comparisons, {len(report.failed)} failed, "
      f"{len(report.skipped)} skipped, {len(report.unchecked)} not checked, {seconds:.0f} s"
    )
    status = max(status, 1 if report.failed else 0)
    results.append(_as_json(path, report, seconds))
  if options.json:
    try:
      atomic_files.write_json(options.json, results)
    except OSError as e:
      print(f"The rows could not be written: {e}.")
      status = 2
  return status


if __name__ == "__main__":
  process.prepare()
  # Each program runs once, for milliseconds: compilation dominates.
  if jax.default_backend() == "cpu":
    jax.config.update("jax_disable_most_optimizations", True)
  sys.exit(main())
