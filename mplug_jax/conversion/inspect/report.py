"""Text reports on one checkpoint or on the differences of two: facts, leaves or groups, totals."""

import functools
import json
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mplug_jax import config as config_lib
from mplug_jax.config.presets import PRESETS
from mplug_jax.conversion.inspect.statistics import Difference, Moments, difference, moments
from mplug_jax.conversion.inspect.tensors import Leaf, Leaves

WIDTH = 140


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


# ---- names and groups


def selected(leaves: Iterable[str], match: str) -> list[str]:
  """Returns the leaf names in which the regex `match` occurs.

  Raises:
    ValueError: it is not a regular expression, or selects nothing.
  """
  try:
    pattern = re.compile(match)
  except re.error as error:
    raise ValueError(f"--match={match!r} is not a regular expression: {error}.") from error
  leaves = list(leaves)
  names = [name for name in leaves if pattern.search(name)]
  if match and not names:
    raise ValueError(f"--match={match!r} selects none of {len(leaves)} leaves.")
  return names


def group_of(name: str, depth: int) -> str:
  """Returns the first `depth` components of a leaf's name, all of them if depth is 0."""
  separator = "/" if "/" in name else "."
  return separator.join(name.split(separator)[:depth]) if depth else name


def part_of(name: str) -> str:
  """Returns the part for a leaf's totals: a module of a parameter tree, else the top level."""
  return group_of(name, 2 if re.match(r"(params|ema_params|dead)/|(module|model)\.", name) else 1)


# ---- text


def _bytes(n: int) -> str:
  power = min(int(math.log(n, 1024)), len(_UNITS) - 1) if n else 0
  return f"{n / 1024**power:.1f} {_UNITS[power]}" if power else f"{n} B"


def _shape(shape: tuple[int, ...]) -> str:
  return "x".join(map(str, shape)) or "scalar"


def _number(x: float) -> str:
  return "-" if math.isnan(x) else f"{x:.2e}"


# Columns aligned to the left, as is the first column.
_TEXTS = ("shape", "dtype", "sharding", "first", "second")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """Formats rows of texts as aligned lines under a header."""
  widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
  align = [str.ljust if i == 0 or name in _TEXTS else str.rjust for i, name in enumerate(header)]
  return [
    "  ".join(pad(text, width) for pad, text, width in zip(align, line, widths)).rstrip()
    for line in (header, *rows)
  ]


def _wrapped(name: str, text: str) -> list[str]:
  return textwrap.wrap(
    f"{name:<15} {text}", WIDTH, subsequent_indent=" " * 16, break_on_hyphens=False
  )


def facts(source: Leaves, path: str | os.PathLike, whole_config: bool = False) -> list[str]:
  """Returns lines with the kind, step, tokenizer, geometry and config of a checkpoint.

  Args:
    source: the opened checkpoint.
    path: its path.
    whole_config: show the complete config rather than the differences from the defaults.
  """
  lines = _wrapped("kind", f"{source.kind} {path}")
  for name, text in source.facts.items():
    lines += _wrapped(name, textwrap.shorten(str(text), 1000, placeholder=" ..."))
  if source.geometry:
    lines += _wrapped(
      "geometry", ", ".join(f"{name}={value}" for name, value in source.geometry.items())
    )
  if source.config and whole_config:
    lines += [
      "config",
      *(
        f"  {name} = {json.dumps(value)}" for name, value in config_lib.flat(source.config).items()
      ),
    ]
  elif source.config:
    lines += _wrapped("config", _compact(source.config))
  return lines


def _compact(config: dict[str, Any]) -> str:
  """Returns the task, the closest size, and the values that differ from their defaults."""
  values = config_lib.flat(config)
  task = config.get("task", {}).get("name", "unknown")
  changed = {}
  for size in PRESETS:
    defaults = config_lib.flat(
      json.loads(config_lib.to_json(config_lib.default_config(task, size)))
    )
    changed[size] = {
      name: value for name, value in values.items() if defaults.get(name, ...) != value
    }
  size = min(changed, key=lambda size: len(changed[size]))
  return f"task {task}, size {size}; other than the defaults: " + ", ".join(
    f"{name}={json.dumps(x)}" for name, x in changed[size].items()
  )


def tree(source: Leaves, names: list[str], depth: int = 0, values: bool = True) -> list[str]:
  """Returns a table of leaves or groups, then totals by part.

  Shardings have a column only if the checkpoint stores any.

  Args:
    source: the opened checkpoint.
    names: of the leaves to show.
    depth: show groups by this many components of the names; 0 for single leaves.
    values: read the values, for mean and standard deviation.
  """
  stats = {name: moments(array) for name, array in source.read(names)} if values else {}
  sharded = any(source.leaves[name].sharding != "-" for name in names)
  header = ["group" if depth else "leaf", "shape", "dtype", "bytes"]
  if sharded:
    header.append("sharding")
  if values:
    header += ["mean", "std", "nan/inf"]
  rows = []
  for group, members in _grouped(names, lambda name: group_of(name, depth)).items():
    row = _row(group, [source.leaves[name] for name in members])
    if sharded:
      row.append(_common(source.leaves[name].sharding for name in members))
    if values:
      row += _values(functools.reduce(Moments.merge, (stats[name] for name in members)))
    rows.append(row)
  return [*table(header, rows), "", *_totals(source, names), *_warning(stats)]


def _row(group: str, leaves: list[Leaf]) -> list[str]:
  """Returns name, shape or count, dtype and bytes of one or more leaves."""
  return [
    group,
    _shape(leaves[0].shape) if len(leaves) == 1 else f"{len(leaves)} leaves",
    _common(leaf.dtype.name for leaf in leaves),
    _bytes(sum(leaf.nbytes for leaf in leaves)),
  ]


def _grouped(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
  groups = {}
  for name in names:
    groups.setdefault(key(name), []).append(name)
  return groups


def _common(texts: Iterable[str]) -> str:
  distinct = set(texts)
  return distinct.pop() if len(distinct) == 1 else "several"


def _values(m: Moments) -> list[str]:
  return [_number(m.mean if m.count else math.nan), _number(m.std), f"!! {m.bad}" if m.bad else "0"]


def _totals(source: Leaves, names: list[str]) -> list[str]:
  rows = []
  for part, members in (_grouped(names, part_of) | {"all": names}).items():
    leaves = [source.leaves[name] for name in members]
    rows.append(
      [
        part,
        str(len(leaves)),
        f"{sum(leaf.size for leaf in leaves):,}",
        _bytes(sum(leaf.nbytes for leaf in leaves)),
      ]
    )
  return table(["part", "leaves", "parameters", "bytes"], rows)


def _warning(stats: Mapping[str, Moments]) -> list[str]:
  bad = {name: m.bad for name, m in stats.items() if m.bad}
  if not bad:
    return []
  return [
    "",
    f"!! {sum(bad.values())} numbers in {len(bad)} leaves are not finite:",
    *(f"!! {name}: {n}" for name, n in bad.items()),
  ]


# ---- two checkpoints


def compare(
  a: Leaves, b: Leaves, match: str = "", depth: int = 0, values: bool = True
) -> tuple[list[str], bool]:
  """Compares two checkpoints.

  Args:
    a: first checkpoint.
    b: second checkpoint.
    match: regex that selects leaves by name.
    depth: show groups by this many components of the names; 0 for single leaves.
    values: compare the values too.

  Returns:
    (lines, whether the selected leaves have equal names, shapes, dtypes and, with `values`, bytes).

  Raises:
    ValueError: the regex is invalid or selects nothing, or leaves cannot be read.
  """
  names = selected(dict.fromkeys([*a.leaves, *b.leaves]), match)
  lines = []
  unshared = 0
  for title, source, other in (("only in the first", a, b), ("only in the second", b, a)):
    only = [name for name in names if name in source.leaves and name not in other.leaves]
    unshared += len(only)
    lines += _alone(title, source, only, depth)
  common = [name for name in names if name in a.leaves and name in b.leaves]
  reshaped = [name for name in common if a.leaves[name].shape != b.leaves[name].shape]
  if reshaped:
    rows = [[name, _shape(a.leaves[name].shape), _shape(b.leaves[name].shape)] for name in reshaped]
    lines += [*table(["another shape", "first", "second"], rows), ""]
  retyped = [name for name in common if a.leaves[name].dtype != b.leaves[name].dtype]
  differing = (
    _differences(a, b, [name for name in common if name not in reshaped]) if values else {}
  )
  changed = differing.keys() | set(retyped)
  lines += _differing(
    a, b, [name for name in common if name in changed and name not in reshaped], differing, depth
  )
  changed |= set(reshaped)
  counts = {
    "only in one": unshared,
    "of another shape": len(reshaped),
    "of another dtype": len(retyped),
    "of other values": len(differing),
  }
  equal = f"{len(common) - len(changed)} of {len(names)} leaves are equal" + (
    "" if values else " in shape and dtype; no values were read"
  )
  lines.append(
    "; ".join([equal, ", ".join(f"{n} {problem}" for problem, n in counts.items())]) + "."
  )
  return lines, not unshared and not changed


def _alone(title: str, source: Leaves, names: list[str], depth: int) -> list[str]:
  groups = _grouped(names, lambda name: group_of(name, depth))
  rows = [
    _row(group, [source.leaves[name] for name in members]) for group, members in groups.items()
  ]
  return [*table([title, "shape", "dtype", "bytes"], rows), ""] if rows else []


def _differences(a: Leaves, b: Leaves, names: list[str]) -> dict[str, Difference]:
  """Returns {name: Difference} of leaves with different bytes; with other dtypes, values."""
  differences = {}
  for (name, x), (_, y) in zip(a.read(names), b.read(names), strict=True):
    if x.dtype == y.dtype and np.array_equal(
      np.ravel(x).view(np.uint8), np.ravel(y).view(np.uint8)
    ):
      continue
    distance = difference(x, y)
    if x.dtype == y.dtype or distance.max:
      differences[name] = distance
  return differences


def _differing(
  a: Leaves, b: Leaves, names: list[str], differences: Mapping[str, Difference], depth: int
) -> list[str]:
  """Returns a table of leaves or groups, the largest relative difference first."""
  rows = []
  for group, members in _grouped(names, lambda name: group_of(name, depth)).items():
    distance = functools.reduce(
      Difference.merge, (differences.get(name, Difference()) for name in members)
    )
    dtypes = [_common(source.leaves[name].dtype.name for name in members) for source in (a, b)]
    _, shape, *_ = _row(group, [a.leaves[name] for name in members])
    rows.append(
      (
        distance,
        [
          group,
          shape,
          " -> ".join(dict.fromkeys(dtypes)),
          _number(distance.max),
          _number(distance.relative),
        ],
      )
    )
  rows.sort(key=lambda row: (-row[0].relative, -row[0].max))
  if not rows:
    return []
  header = ["different", "shape", "dtype", "max |a - b|", "relative L2"]
  return [*table(header, [row for _, row in rows]), ""]
