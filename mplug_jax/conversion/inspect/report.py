"""What a checkpoint holds, and how two differ, as lines of text: facts, one line for each leaf or group, totals."""

import functools
import json
import math
import re
import textwrap
from typing import NamedTuple

import numpy as np

from mplug_jax import config as config_lib
from mplug_jax.config.presets import PRESETS

WIDTH = 140
_CHUNK = 1 << 22  # numbers that are float64 at a time
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Moments(NamedTuple):
  """Of the finite numbers: how many, mean, sum of squared deviations; and how many numbers are not finite."""

  count: int = 0
  mean: float = 0.0
  m2: float = 0.0
  bad: int = 0

  def merge(self, other):
    """Moments of both sets of numbers together."""
    count = self.count + other.count
    if not count:
      return self._replace(bad=self.bad + other.bad)
    delta = other.mean - self.mean
    return Moments(
      count,
      self.mean + delta * other.count / count,
      self.m2 + other.m2 + delta * delta * self.count * other.count / count,
      self.bad + other.bad,
    )

  @property
  def std(self):
    return math.sqrt(self.m2 / self.count) if self.count else math.nan


def moments(array) -> Moments:
  """Of an array of any numeric dtype, in float64 a chunk at a time."""
  total = Moments()
  for chunk in _chunks(array):
    finite = np.isfinite(chunk)
    x = chunk if finite.all() else chunk[finite]
    mean = x.mean() if len(x) else 0.0
    total = total.merge(
      Moments(len(x), float(mean), float(np.square(x - mean).sum()), len(chunk) - len(x))
    )
  return total


def _chunks(array):
  flat = np.asarray(array).reshape(-1)
  for start in range(0, len(flat), _CHUNK):
    yield flat[start : start + _CHUNK].astype(np.float64)


class Difference(NamedTuple):
  """Of two arrays of one shape: largest |a - b|, sum of (a - b)^2 and of a^2; max is inf where only one is finite."""

  max: float = 0.0
  squares: float = 0.0
  reference: float = 0.0

  def merge(self, other):
    return Difference(
      max(self.max, other.max), self.squares + other.squares, self.reference + other.reference
    )

  @property
  def relative(self):
    """L2 norm of the difference by that of the first array."""
    return (
      math.sqrt(self.squares / self.reference)
      if self.reference
      else math.inf
      if self.squares
      else 0.0
    )


def difference(a, b) -> Difference:
  """Of two arrays of one shape; NaN beside NaN and equal infinities are no difference."""
  total = Difference()
  with np.errstate(invalid="ignore"):
    for x, y in zip(_chunks(a), _chunks(b), strict=True):
      distance = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y))
      distance[np.isnan(distance)] = np.inf
      total = total.merge(
        Difference(
          float(distance.max()),
          float(np.square(distance).sum()),
          float(np.square(x[np.isfinite(x)]).sum()),
        )
      )
  return total


# ---- names and groups


def selected(leaves, match):
  """Names that the regex is found in.

  Raises:
    ValueError: no regex, or it selects nothing.
  """
  try:
    pattern = re.compile(match)
  except re.error as error:
    raise ValueError(f"--match={match!r} is no regular expression: {error}.") from error
  names = [name for name in leaves if pattern.search(name)]
  if match and not names:
    raise ValueError(f"--match={match!r} selects none of {len(leaves)} leaves.")
  return names


def group_of(name, depth):
  """The first `depth` components of a leaf's name; depth 0: the whole name."""
  separator = "/" if "/" in name else "."
  return separator.join(name.split(separator)[:depth]) if depth else name


def part_of(name):
  """The part whose totals a leaf counts in: a module of a parameter tree, else the top of the tree."""
  return group_of(name, 2 if re.match(r"(params|ema_params|dead)/|(module|model)\.", name) else 1)


# ---- text


def _bytes(n):
  power = min(int(math.log(n, 1024)), len(_UNITS) - 1) if n else 0
  return f"{n / 1024**power:.1f} {_UNITS[power]}" if power else f"{n} B"


def _shape(shape):
  return "x".join(map(str, shape)) or "scalar"


def _number(x):
  return "-" if math.isnan(x) else f"{x:.2e}"


_TEXTS = (
  "shape",
  "dtype",
  "sharding",
  "first",
  "second",
)  # columns that are aligned to the left, as the first one is


def table(header, rows):
  """Rows of texts -> aligned lines under a header."""
  widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
  align = [str.ljust if i == 0 or name in _TEXTS else str.rjust for i, name in enumerate(header)]
  return [
    "  ".join(pad(text, width) for pad, text, width in zip(align, line, widths)).rstrip()
    for line in (header, *rows)
  ]


def _wrapped(name, text):
  return textwrap.wrap(
    f"{name:<15} {text}", WIDTH, subsequent_indent=" " * 16, break_on_hyphens=False
  )


def facts(source, path, whole_config=False):
  """Lines: kind, step, tokenizer, geometry, config. `whole_config`: all of it rather than what differs from the defaults."""
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


def _compact(config):
  """Task, the size whose geometry is nearest, and the values that differ from their defaults or are the task's own."""
  given, task = config_lib.flat(config), config.get("task", {}).get("name", "unknown")
  found = {}
  for size in PRESETS:
    defaults = config_lib.flat(
      json.loads(config_lib.to_json(config_lib.default_config(task, size)))
    )
    found[size] = {name: value for name, value in given.items() if defaults.get(name, ...) != value}
  size = min(found, key=lambda size: len(found[size]))
  return f"task {task}, size {size}; beside the defaults: " + ", ".join(
    f"{name}={json.dumps(x)}" for name, x in found[size].items()
  )


def tree(source, names, depth=0, values=True):
  """Lines: the leaves `names`, or with `depth` their groups, with mean and standard deviation; then totals by part.

  The shardings have a column where any is stored: in PyTorch weights there would be nothing in it.
  """
  stats = {name: moments(array) for name, array in source.read(names)} if values else {}
  sharded = any(source.leaves[name].sharding != "-" for name in names)
  header = [
    "group" if depth else "leaf",
    "shape",
    "dtype",
    "bytes",
    *["sharding"] * sharded,
    *["mean", "std", "nan/inf"] * values,
  ]
  rows = []
  for group, members in _grouped(names, lambda name: group_of(name, depth)).items():
    row = _row(group, [source.leaves[name] for name in members])
    if sharded:
      row.append(_common(source.leaves[name].sharding for name in members))
    rows.append(
      row
      + (
        _values(functools.reduce(Moments.merge, (stats[name] for name in members)))
        if values
        else []
      )
    )
  return [*table(header, rows), "", *_totals(source, names), *_warning(stats)]


def _row(group, leaves):
  """Name, shape or number, dtype and bytes of one leaf or of several."""
  return [
    group,
    _shape(leaves[0].shape) if len(leaves) == 1 else f"{len(leaves)} leaves",
    _common(leaf.dtype.name for leaf in leaves),
    _bytes(sum(leaf.nbytes for leaf in leaves)),
  ]


def _grouped(names, key):
  groups = {}
  for name in names:
    groups.setdefault(key(name), []).append(name)
  return groups


def _common(texts):
  texts = set(texts)
  return texts.pop() if len(texts) == 1 else "several"


def _values(m):
  return [_number(m.mean if m.count else math.nan), _number(m.std), f"!! {m.bad}" if m.bad else "0"]


def _totals(source, names):
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


def _warning(stats):
  bad = {name: m.bad for name, m in stats.items() if m.bad}
  if not bad:
    return []
  return [
    "",
    f"!! {sum(bad.values())} numbers in {len(bad)} leaves are not finite:",
    *(f"!! {name}: {n}" for name, n in bad.items()),
  ]


# ---- two checkpoints


def compare(a, b, match="", depth=0, values=True):
  """Two `leaves.Leaves` -> (lines, whether the selected leaves are identical: names, shapes, dtypes and, with `values`, bytes).

  Raises:
    ValueError: see `selected`; and for leaves that cannot be read.
  """
  names = selected(dict.fromkeys([*a.leaves, *b.leaves]), match)
  lines, alone = [], 0
  for title, source, other in (("only in the first", a, b), ("only in the second", b, a)):
    only = [name for name in names if name in source.leaves and name not in other.leaves]
    alone += len(only)
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
    "only in one": alone,
    "of another shape": len(reshaped),
    "of another dtype": len(retyped),
    "of other values": len(differing),
  }
  equal = f"{len(common) - len(changed)} of {len(names)} leaves are equal" + (
    "" if values else " in shape and dtype; no values were read"
  )
  lines.append("; ".join([equal, ", ".join(f"{n} {what}" for what, n in counts.items())]) + ".")
  return lines, not alone and not changed


def _alone(title, source, names, depth):
  groups = _grouped(names, lambda name: group_of(name, depth))
  rows = [
    _row(group, [source.leaves[name] for name in members]) for group, members in groups.items()
  ]
  return [*table([title, "shape", "dtype", "bytes"], rows), ""] if rows else []


def _differences(a, b, names):
  """{name: Difference} of the leaves whose bytes differ; for other dtypes, whose values do."""
  found = {}
  for (name, x), (_, y) in zip(a.read(names), b.read(names), strict=True):
    if x.dtype == y.dtype and np.array_equal(
      np.ravel(x).view(np.uint8), np.ravel(y).view(np.uint8)
    ):
      continue
    distance = difference(x, y)
    if x.dtype == y.dtype or distance.max:
      found[name] = distance
  return found


def _differing(a, b, names, differences, depth):
  """A table of leaves or groups, the largest relative difference first."""
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
  return (
    [
      *table(
        ["different", "shape", "dtype", "max |a - b|", "relative L2"], [row for _, row in rows]
      ),
      "",
    ]
    if rows
    else []
  )
