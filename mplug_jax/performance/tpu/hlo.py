"""What a compiled XLA program does, counted in its text: operations, memory traffic, collectives, with loops as often as they run.

XLA's own count sees the body of a loop once. Here a loop's trips are the constant that its
condition compares with. Counts are of one device. Pure Python.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

_BITS = {
  "pred": 8,
  "s4": 4,
  "u4": 4,
  "s8": 8,
  "u8": 8,
  "s16": 16,
  "u16": 16,
  "bf16": 16,
  "f16": 16,
  "s32": 32,
  "u32": 32,
  "f32": 32,
  "s64": 64,
  "u64": 64,
  "f64": 64,
}
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{\s*$")
_START = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = ")
_FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "after-all",
  "partition-id",
  "replica-id",
  "iota",
  "opt-barrier",
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Instruction(NamedTuple):
  """`type`, `argument` (all between the brackets) and `attributes` are text.

  `operands` are names of instructions beside it.
  """

  name: str
  type: str
  opcode: str
  operands: tuple
  argument: str
  attributes: str
  root: bool


class Cost(NamedTuple):
  """`flops` of matrix products.

  `traffic` bytes read from and written to HBM; `collectives` {kind: (count, bytes of the whole
  array, bytes
  that a device sends)}; loops as often as they run.
  """

  flops: float
  traffic: float
  collectives: dict


def cost(text):
  """Text of an optimised module, `compiled.as_text()` -> Cost of a device.

  Raises:
    ValueError: the text holds no entry computation.
  """
  computations, entry = parse(text)
  if entry is None:
    raise ValueError("The program's text holds no ENTRY computation.")
  flops, traffic, found = _Counter(computations).of(entry)
  kinds = sorted({kind for kind, _ in found})
  return Cost(
    flops,
    traffic,
    {kind: tuple(found[kind, what] for what in ("count", "bytes", "sent")) for kind in kinds},
  )


def parse(text):
  """-> ({computation: {name: Instruction}}, name of the entry or None)."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif current is not None and (start := _START.match(line)):
      current[start[2]] = _instruction(line[start.end() :], start[2], bool(start[1]))
  return computations, entry


def _instruction(rest, name, root):
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  kind, rest = rest[:end], rest[end:].lstrip()
  opening = rest.index("(")
  closing = _closing(rest, opening)
  argument = rest[opening + 1 : closing]
  return Instruction(
    name, kind, rest[:opening], tuple(_NAME.findall(argument)), argument, rest[closing + 1 :], root
  )


def _closing(text, opening):
  depth = 0
  for i in range(opening, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if not depth:
      return i
  raise ValueError(f"A bracket is not closed: {text[opening : opening + 80]}")


def shapes(kind):
  """Type text -> [(dtype, dimensions, whether it is in HBM)], one for every array."""
  return [
    (dtype, tuple(int(n) for n in dims.split(",") if n), "S(" not in (layout or ""))
    for dtype, dims, layout in _ARRAY.findall(kind)
    if dtype in _BITS or dtype.startswith("f8")
  ]


def size(kind, memory=False):
  """Bytes of all arrays of a type.

  `memory`: of those in HBM alone, not in a memory of the chip's own.
  """
  return sum(
    math.prod(dims) * _BITS.get(dtype, 8) / 8
    for dtype, dims, in_memory in shapes(kind)
    if in_memory or not memory
  )


class _Counter:
  def __init__(self, computations):
    self._computations, self._done = computations, {}

  def of(self, name):
    """-> (flops, traffic, Counter of collectives) of a computation."""
    if name not in self._done:
      self._done[name] = self._sum(name)
    return self._done[name]

  def _sum(self, name):
    flops, traffic, collectives = 0.0, 0.0, Counter()
    table = self._computations[name]
    for instruction in table.values():
      opcode = instruction.opcode
      times = 1
      if opcode == "while":
        times = self.trips(table, instruction)
        called = [_called(instruction, "body")]
      elif opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        called = (
          _NAME.findall(branches[1]) if branches else [_called(instruction, "true_computation")]
        )
      else:
        called = [_called(instruction, "to_apply" if opcode == "call" else "calls")]
      inner = [self.of(each) for each in called if each in self._computations]
      flops += times * sum(part[0] for part in inner) + products(table, instruction)
      if opcode in ("while", "conditional", "call"):
        traffic += times * sum(part[1] for part in inner)
      else:
        traffic += self._traffic(table, instruction)
      for part in inner:
        for key, value in part[2].items():
          collectives[key] += times * value
      collectives.update(_collective(table, instruction))
    return flops, traffic, collectives

  def trips(self, table, loop):
    """How often a while loop runs: the constant its condition compares with, 1 where there is none."""
    known = re.search(r"known_trip_count[^0-9]*(\d+)", loop.attributes)
    if known:
      return int(known[1])
    constants = [
      int(each.argument)
      for each in self._nested(_called(loop, "condition"))
      if each.opcode == "constant" and each.argument.isdigit()
    ]
    return max(constants, default=1)

  def _nested(self, name):
    for instruction in self._computations.get(name, {}).values():
      yield instruction
      if inner := _called(instruction, "calls"):
        yield from self._nested(inner)

  def _traffic(self, table, instruction):
    """Bytes of HBM that an instruction reads and writes, the arrays inside a fusion aside."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
      return 0.0
    read = [size(table[name].type, memory=True) for name in instruction.operands if name in table]
    if opcode == "dynamic-slice":
      return 2 * size(instruction.type, memory=True)
    if opcode == "dynamic-update-slice":
      return 2 * read[1] if len(read) > 1 else 0.0
    if opcode == "slice-start":  # a slice of an array goes to another memory
      return _moved(instruction)
    if opcode.endswith("-start"):  # its type repeats the operands
      return sum(read) + max(0.0, size(instruction.type, memory=True) - sum(read))
    written = size(instruction.type, memory=True)
    if opcode == "fusion":
      read, written = self._sliced(instruction, read, written)
    return sum(read) + written

  def _sliced(self, fusion, read, written):
    """Of an operand that a fusion reads only slices of, the slices.

    Of a result that it only updates, the update.
    """
    inner = self._computations.get(_called(fusion, "calls"), {})
    for each in inner.values():
      if each.opcode == "parameter" and int(each.argument) < len(read):
        number = int(each.argument)
        read[number] = min(read[number], self._touched(inner, each))
    root = next((each for each in inner.values() if each.root), None)
    results = (
      [inner.get(name) for name in root.operands] if root and root.opcode == "tuple" else [root]
    )
    outer = shapes(fusion.type)
    if None in results or len(results) != len(outer):
      return read, written
    return read, sum(
      self._renewed(inner, each) for each, (_, _, in_memory) in zip(results, outer) if in_memory
    )

  def _touched(self, table, array):
    """Bytes that the users of an array inside a fusion read of it, infinite where one reads it whole. TPU fusions hold fusions: the slice
    of a stack, and its conversion, is one of them.
    """
    if array.root:
      return math.inf
    total = 0.0
    for user in (each for each in table.values() if array.name in each.operands):
      if user.opcode in ("dynamic-slice", "slice"):
        total += size(user.type)
      elif user.opcode == "bitcast":
        total += self._touched(table, user)
      elif user.opcode == "fusion":
        inner = self._computations.get(_called(user, "calls"), {})
        total += sum(
          self._touched(inner, each)
          for each in inner.values()
          if each.opcode == "parameter" and user.operands[int(each.argument)] == array.name
        )
      elif user.opcode != "dynamic-update-slice" or array.name in user.operands[1:]:
        return math.inf
    return total

  def _renewed(self, table, result):
    """Bytes of a fusion's result that it writes: of a parameter that it updates in place, the update."""
    if result.opcode == "bitcast" and result.operands[0] in table:
      return self._renewed(table, table[result.operands[0]])
    if result.opcode == "dynamic-update-slice" and table[result.operands[0]].opcode == "parameter":
      return size(table[result.operands[1]].type)
    return size(result.type)


def _moved(start):
  """Bytes of HBM that an asynchronous slice reads and writes.

  Its type is ((the array), the slice, a flag).
  """
  (_, _, read), (dtype, dims, written), *_ = shapes(start.type)
  return (read + written) * math.prod(dims) * _BITS.get(dtype, 8) / 8


def _called(instruction, what):
  found = re.search(rf"\b{what}=%([\w.\-]+)", instruction.attributes)
  return found[1] if found else None


def products(table, instruction):
  """Operations, 2 x multiply-adds, of a dot or convolution, and what a Pallas kernel says of itself; 0 of anything else. TPUs compute every
  matrix product as a convolution. Of JAX's flash attention the forward kernel says it, the two
  backward kernels do not.
  """
  if instruction.opcode == "custom-call" and (
    said := re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.attributes)
  ):
    return float(said[1])
  if instruction.opcode not in ("dot", "convolution"):
    return 0.0
  output = shapes(instruction.type)[0][1]
  left, right = (shapes(table[name].type)[0][1] for name in instruction.operands[:2])
  if instruction.opcode == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
    return 2.0 * math.prod(output) * math.prod(left[int(i)] for i in contracted.split(",") if i)
  lhs, rhs, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
  groups = (
    int(found[1]) if (found := re.search(r"batch_group_count=(\d+)", instruction.attributes)) else 1
  )
  window = _window(instruction.attributes)
  total = 2.0 * output[out.index("b")] * output[out.index("f")] * right[rhs.index("i")] / groups
  for i, label in enumerate(sorted(set(lhs) - set("bf"))):
    total *= _pairs(
      left[lhs.index(label)], right[rhs.index(label)], output[out.index(label)], window, i
    )
  return total


def _window(attributes):
  """{"size": "16x12", ...} of window={...}."""
  found = re.search(r"window=\{([^}]*)\}", attributes)
  return dict(part.split("=") for part in found[1].split()) if found else {}


def _pairs(inputs, kernel, outputs, window, i):
  """Pairs of an output and a kernel position that meet an input element, in the i-th dimension of the window: neither padding nor a gap
  that dilation makes. A batch dimension of a product is one in which every output meets one.
  """
  value = lambda name, default: window[name].split("x")[i] if name in window else default  # noqa: E731
  stride, dilation, kernel_dilation = (
    int(value(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate")
  )
  low = int(value("pad", "0_0").split("_")[0])
  # position = out * stride + k * kernel_dilation - low must be a multiple of dilation, and within
  # the inputs: out is in a range, and one of every `step` numbers. In closed form, since a batch
  # may be such a dimension: thousands of kernel positions by thousands of outputs.
  shared = math.gcd(stride, dilation)
  step = dilation // shared
  inverse = pow(stride // shared, -1, step) if step > 1 else 0
  count = 0
  for k in range(kernel):
    rest = low - k * kernel_dilation
    if rest % shared:
      continue
    first, last = (
      max(0, -(-rest // stride)),
      min(outputs - 1, (rest + (inputs - 1) * dilation) // stride),
    )
    first += (rest // shared * inverse - first) % step
    count += max(0, (last - first) // step + 1)
  return count


def _collective(table, instruction):
  """Counter of what a collective is: its count, the bytes of its whole array, and the bytes a device sends on a ring."""
  kind = instruction.opcode.removesuffix("-start")
  if kind not in COLLECTIVES:
    return {}
  operands = sum(size(table[name].type) for name in instruction.operands if name in table)
  results = size(instruction.type)
  if instruction.opcode.endswith("-start") and kind != "all-reduce":
    results = max(0.0, results - operands)
  whole, members = max(operands, results), _members(instruction.attributes)
  share = (members - 1) / members if members > 1 else 0.0
  sent = (
    whole if kind == "collective-permute" else whole * share * (2 if kind == "all-reduce" else 1)
  )
  return {(kind, "count"): 1, (kind, "bytes"): whole, (kind, "sent"): sent}


def _members(attributes):
  """Devices of a group of a collective."""
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
    return int(iota[2])
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return len(listed[1].split(","))
  return 2
