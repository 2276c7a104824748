"""Texts and table rows of tools.compile_tpu."""

import os
from collections.abc import Callable
from typing import Any, TypeAlias

from mplug_jax.config import Config
from mplug_jax.performance.tpu import breakdown, plan, topology
from mplug_jax.performance.tpu import compile as compiler

_GIB, _TERA, _GB = 2.0**30, 1e12, 1e9

# Function (lines of text, row of a table or None).
Say: TypeAlias = Callable[[list[str], dict[str, Any] | None], None]


def run(
  config: Config,
  name: str,
  function: str,
  effort: str,
  planned: bool,
  max_compiles: int,
  say: Say,
  detailed: bool = False,
  dump: str = "",
) -> int:
  """Compiles a function for a slice and reports the result.

  Args:
    config: config of the run.
    name: name of the slice.
    function: "train", or name of a predict function on the command line.
    effort: optimization effort of the compiler, "low" or "full".
    planned: whether to search for the fastest train step.
    max_compiles: number of compilations to try.
    say: function (lines, row of a table or None), which prints or stores them.
    detailed: whether to report traffic and products by part of the model; not with `planned`.
    dump: folder for the program's text and all rows of the detailed report, or ""; likewise.

  Returns:
    Exit status: 0 if the program fits, 3 if it does not.

  Raises:
    ValueError: see topology.slice_of and compile.compile_for.
    FileExistsError: `dump` is not empty.
    topology.NoCompiler: libtpu is not installed.
  """
  tpu = topology.slice_of(name)
  if dump:
    _make_empty(dump)
  if planned:
    return _plan(config, tpu, effort, max_compiles, say)
  try:
    report = compiler.compile_for(config, tpu, function, effort)
  except compiler.DoesNotFit as error:
    return _too_large(error, config, tpu, function, effort, max_compiles, say)
  say(lines(report, config, tpu, function, effort), row(report, config, tpu, function, effort))
  rows = breakdown.rows(report.text) if detailed or dump else []
  if detailed:
    say(breakdown.table(rows), None)
  if dump:
    with open(os.path.join(dump, "program.txt"), "w") as file:
      file.write(report.text)
    breakdown.write_csv(os.path.join(dump, "breakdown.csv"), rows)
  return 0


def _make_empty(folder: str) -> None:
  """Makes a folder, or checks that it is empty."""
  os.makedirs(folder, exist_ok=True)
  if os.listdir(folder):
    raise FileExistsError(f"--dump={folder} is not empty; choose another folder.")


def _gib(size: float) -> str:
  return f"{size / _GIB:.2f} GiB"


def lines(
  report: compiler.Report, config: Config, tpu: topology.Slice, function: str, effort: str
) -> list[str]:
  """Formats a report as lines of text.

  Args:
    report: report of the compiled program.
    config: config of the run.
    tpu: slice of the program.
    function: "train", or name of a predict function on the command line.
    effort: optimization effort of the compiler, "low" or "full".
  """
  text = [
    f"{config.name} {function} on {tpu.name}: compiled in {report.compile_seconds:.0f} s, not "
    f"executed; of one of {tpu.chips} chips:",
    f"  memory      {_gib(report.peak)} of {_gib(tpu.chip.memory)}: arguments "
    f"{_gib(report.arguments)}, temporaries {_gib(report.temporaries)}",
    f"  operations  {report.flops / _TERA:.3f} TFLOP compiled, {report.model_flops / _TERA:.3f} of "
    f"the model, {report.flops / report.model_flops:.2f} x",
    f"  traffic     {report.traffic / _GB:.2f} GB of HBM",
  ]
  for kind, (count, size, sent) in report.collectives.items():
    text.append(
      f"  {kind:<19} {count:,.0f} of {size / _GB:.3f} GB together, {sent / _GB:.3f} GB sent"
    )
  times = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in report.seconds.items())
  text.append(
    f"  at least    {times} at published rates: {report.bound} bounds it, MFU at most "
    f"{100 * report.utilization(tpu.chip):.0f}%"
  )
  if effort == "low" and report.bound == "memory":
    text.append("              of this program; --effort=full compiles one that moves less memory")
  return text


def row(
  report: compiler.Report, config: Config, tpu: topology.Slice, function: str, effort: str
) -> dict[str, Any]:
  """Returns a report as {column: value} for a table.

  Args:
    report: report of the compiled program.
    config: config of the run.
    tpu: slice of the program.
    function: "train", or name of a predict function on the command line.
    effort: optimization effort of the compiler, "low" or "full".
  """
  return {
    "fn": function,
    "topology": tpu.name,
    "effort": effort,
    "batch": config.batch_size if function == "train" else config.eval.batch_size,
    "fits": True,
    "peak_gib": report.peak / _GIB,
    "arguments_gib": report.arguments / _GIB,
    "temporaries_gib": report.temporaries / _GIB,
    "tflop": report.flops / _TERA,
    "model_tflop": report.model_flops / _TERA,
    "traffic_gb": report.traffic / _GB,
    "collectives": report.collectives,
    "seconds": report.seconds,
    "bound": report.bound,
    "mfu": report.utilization(tpu.chip),
    "compile_seconds": report.compile_seconds,
  }


def _too_large(
  error: compiler.DoesNotFit,
  config: Config,
  tpu: topology.Slice,
  function: str,
  effort: str,
  max_compiles: int,
  say: Say,
) -> int:
  """Reports a program that does not fit, and flags with which it does; returns status 3."""
  say(
    [f"{config.name} {function} on {tpu.name}: {error}"],
    {
      "fn": function,
      "topology": tpu.name,
      "effort": effort,
      "batch": config.batch_size,
      "fits": False,
      "needed_gib": error.needed / _GIB,
      "limit_gib": error.limit / _GIB,
    },
  )
  if function != "train":
    say([f"  a smaller --batch than {config.eval.batch_size} needs less"], None)
  elif repaired := plan.repair(config, tpu, function, effort, max_compiles):
    flags, report = repaired
    say(
      [
        "this fits: " + " ".join(f"--config.{name}={value}" for name, value in flags.items()),
        *lines(report, config, tpu, function, effort),
      ],
      row(report, plan.changed(config, flags), tpu, function, effort) | {"flags": flags},
    )
  else:
    say(
      [
        f"nothing tried fits (of --max_compiles={max_compiles}): more chips, a smaller --batch, "
        "or fewer pixels do"
      ],
      None,
    )
  return 3


def _plan(config: Config, tpu: topology.Slice, effort: str, max_compiles: int, say: Say) -> int:
  """Searches for the fastest train step and reports every compiled one; returns the exit status."""
  tried = plan.search(config, tpu, effort, max_compiles)
  fitting = []
  for candidate, report in tried:
    if isinstance(report, Exception):
      say([f"{candidate}: {report}"], None)
      continue
    fitting.append((report.seconds[report.bound], str(candidate)))
    say(
      [f"{candidate}:", *lines(report, config, tpu, "train", effort)],
      row(report, plan.changed(config, candidate.flags), tpu, "train", effort)
      | {"flags": candidate.flags},
    )
  if not fitting:
    say([f"none of the {len(tried)} tried fits; more chips or a smaller --batch do"], None)
    return 3
  seconds, best = min(fitting)
  rate = config.batch_size / seconds
  say(
    [
      f"fastest that fits: {best}",
      f"  at least {1e3 * seconds:.1f} ms an update, at most {rate:,.0f} rows a second",
    ],
    None,
  )
  return 0
