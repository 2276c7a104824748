"""What tools.compile_tpu prints."""

from mplug_jax.performance.tpu import compile as compiler
from mplug_jax.performance.tpu import plan, topology

_GIB, _TERA, _GB = 2.0**30, 1e12, 1e9


def run(config, name, function, effort, planned, max_compiles, say):
  """Compiles and tells -> exit status 0 (fits) or 3 (does not).

  Args:
    name: of the slice. function: "train" or a predict function. planned: search the fastest train
      step.
    say: function (lines, row of a table or None).

  Raises:
    ValueError, topology.NoCompiler: see topology.slice_of and compile.compile_for.
  """
  place = topology.slice_of(name)
  if planned:
    return _plan(config, place, effort, max_compiles, say)
  try:
    found = compiler.compile_for(config, place, function, effort)
  except compiler.DoesNotFit as error:
    return _too_large(error, config, place, function, effort, max_compiles, say)
  say(lines(found, config, place, function, effort), row(found, config, place, function, effort))
  return 0


def lines(found, config, place, function, effort):
  """A Report as text."""
  chip, gib = place.chip, lambda x: f"{x / _GIB:.2f} GiB"
  out = [
    f"{config.name} {function} on {place.name}: compiled in {found.compile_seconds:.0f} s, not "
    f"executed; of one of {place.chips} chips:",
    f"  memory      {gib(found.peak)} of {gib(chip.memory)}: arguments {gib(found.arguments)}, "
    f"temporaries {gib(found.temporaries)}",
    f"  operations  {found.flops / _TERA:.3f} TFLOP compiled, {found.model_flops / _TERA:.3f} of "
    f"the model, "
    f"{found.flops / found.model_flops:.2f} x",
    f"  traffic     {found.traffic / _GB:.2f} GB of HBM",
  ]
  for kind, (count, size, sent) in found.collectives.items():
    out.append(
      f"  {kind:<19} {count:,.0f} of {size / _GB:.3f} GB together, {sent / _GB:.3f} GB sent"
    )
  times = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in found.seconds.items())
  out.append(
    f"  at least    {times} at published rates: {found.bound} bounds it, MFU at most "
    f"{100 * found.utilisation(chip):.0f}%"
  )
  if effort == "low" and found.bound == "memory":
    out.append("              of this program; --effort=full compiles one that moves less memory")
  return out


def row(found, config, place, function, effort):
  """A Report as {name: number or text} for a table."""
  return {
    "fn": function,
    "topology": place.name,
    "effort": effort,
    "batch": config.batch_size if function == "train" else config.eval.batch_size,
    "fits": True,
    "peak_gib": found.peak / _GIB,
    "arguments_gib": found.arguments / _GIB,
    "temporaries_gib": found.temporaries / _GIB,
    "tflop": found.flops / _TERA,
    "model_tflop": found.model_flops / _TERA,
    "traffic_gb": found.traffic / _GB,
    "collectives": found.collectives,
    "seconds": found.seconds,
    "bound": found.bound,
    "mfu": found.utilisation(place.chip),
    "compile_seconds": found.compile_seconds,
  }


def _too_large(error, config, place, function, effort, max_compiles, say):
  head = f"{config.name} {function} on {place.name}: {error}"
  say(
    [head],
    {
      "fn": function,
      "topology": place.name,
      "effort": effort,
      "batch": config.batch_size,
      "fits": False,
      "needed_gib": error.needed / _GIB,
      "limit_gib": error.limit / _GIB,
    },
  )
  if function != "train":
    say([f"  a smaller --batch than {config.eval.batch_size} needs less"], None)
  elif fixed := plan.repair(config, place, function, effort, max_compiles):
    flags, found = fixed
    say(
      [
        "this fits: " + " ".join(f"--config.{name}={value}" for name, value in flags.items()),
        *lines(found, config, place, function, effort),
      ],
      row(found, plan.changed(config, flags), place, function, effort) | {"flags": flags},
    )
  else:
    say(
      [
        f"nothing tried fits (of --max_compiles={max_compiles}): more chips, a smaller --batch, "
        f"or fewer pixels do"
      ],
      None,
    )
  return 3


def _plan(config, place, effort, max_compiles, say):
  tried = plan.search(config, place, effort, max_compiles)
  for candidate, found in tried:
    if isinstance(found, Exception):
      say([f"{candidate}: {found}"], None)
    else:
      say(
        [f"{candidate}:", *lines(found, config, place, "train", effort)],
        row(found, plan.changed(config, candidate.flags), place, "train", effort)
        | {"flags": candidate.flags},
      )
  fitting = [
    (found.seconds[found.bound], str(candidate))
    for candidate, found in tried
    if not isinstance(found, Exception)
  ]
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
