"""Counts operations, memory traffic and collectives in the text of a compiled XLA program.

XLA's own count sees the body of a loop once. Here a loop counts as often as it runs, which is the
constant that its condition compares with. Counts are of one device. Pure Python.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from mplug_jax.performance.tpu.hlo_text import (
  BITS,
  NAME,
  Computation,
  Instruction,
  called_computation,
  parse,
  shapes,
  size,
)

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


class Cost(NamedTuple):
  """Cost of a program on a device, with loops as often as they run.

  Attributes:
    flops: operations of matrix products.
    traffic: bytes read from and written to HBM.
    collectives: {kind: (count, bytes of the whole arrays, bytes that a device sends)}.
  """

  flops: float
  traffic: float
  collectives: dict[str, tuple[float, float, float]]


class Execution(NamedTuple):
  """An instruction that a device executes, with what it costs each time.

  Attributes:
    instruction: instruction of the entry computation, or of one that control flow runs.
    times: how often it is executed.
    flops: operations of its matrix products, those of a fusion together.
    traffic: bytes read from and written to HBM.
    collectives: {(kind, quantity): number}, see Cost.
    fused: the instructions of its fusion, if it is one, and of those inside.
  """

  instruction: Instruction
  times: float
  flops: float
  traffic: float
  collectives: dict[tuple[str, str], float]
  fused: tuple[Instruction, ...]


def cost(text: str) -> Cost:
  """Counts a program.

  Args:
    text: an optimized module, compiled.as_text().

  Raises:
    ValueError: the text has no entry computation.
  """
  flops = 0.0
  traffic = 0.0
  counts: dict[tuple[str, str], float] = {}
  for execution in executions(text):
    flops += execution.times * execution.flops
    traffic += execution.times * execution.traffic
    for key, value in execution.collectives.items():
      counts[key] = counts.get(key, 0) + execution.times * value
  kinds = sorted({kind for kind, _ in counts})
  return Cost(
    flops,
    traffic,
    {kind: (counts[kind, "count"], counts[kind, "bytes"], counts[kind, "sent"]) for kind in kinds},
  )


def executions(text: str) -> Iterator[Execution]:
  """Yields the instructions that a device executes.

  Args:
    text: an optimized module, compiled.as_text().

  Raises:
    ValueError: the text has no entry computation.
  """
  computations, entry = parse(text)
  if entry is None:
    raise ValueError("The program's text holds no ENTRY computation.")
  yield from _Walk(computations).of(entry, 1.0)


class _Walk:
  """Follows control flow through the computations of a module."""

  def __init__(self, computations: dict[str, Computation]):
    self._computations = computations
    self._begun: set[str] = set()  # channels of the collectives that were counted

  def of(self, name: str, times: float) -> Iterator[Execution]:
    """Yields the executions of a computation that runs `times` times."""
    table = self._computations[name]
    for instruction in table.values():
      opcode = instruction.opcode
      callees = [callee for callee in _callees(instruction) if callee in self._computations]
      if opcode in ("while", "conditional", "call"):
        trips = self._trips(instruction) if opcode == "while" else 1
        for callee in callees:
          yield from self.of(callee, times * trips)
        continue
      flops = products(table, instruction)
      traffic = self._traffic(table, instruction)
      collectives = _collective(table, instruction)
      fused: list[Instruction] = []
      for callee in callees:
        for inner in self.of(callee, 1.0):
          flops += inner.times * inner.flops
          fused += [inner.instruction, *inner.fused]
          if not inner.collectives or not self._begins(inner.instruction):
            continue
          traffic += inner.times * inner.traffic
          for key, value in inner.collectives.items():
            collectives[key] = collectives.get(key, 0) + inner.times * value
      yield Execution(instruction, times, flops, traffic, collectives, tuple(fused))

  def _begins(self, collective: Instruction) -> bool:
    """Whether the program has not begun this collective before.

    An asynchronous one is in every fusion that computes while it goes on, under one channel.
    """
    channel = re.search(r"channel_id=(\d+)", collective.attributes)
    name = channel[1] if channel else collective.name
    begins = name not in self._begun
    self._begun.add(name)
    return begins

  def _trips(self, loop: Instruction) -> int:
    """Returns how often a while loop runs: the constant of its condition, 1 if it has none."""
    known = re.search(r"known_trip_count[^0-9]*(\d+)", loop.attributes)
    if known:
      return int(known[1])
    constants = [
      int(instruction.argument)
      for instruction in self._nested(called_computation(loop, "condition"))
      if instruction.opcode == "constant" and instruction.argument.isdigit()
    ]
    return max(constants, default=1)

  def _nested(self, name: str | None) -> Iterator[Instruction]:
    """Yields the instructions of a computation and of those that it calls."""
    if name is None:
      return
    for instruction in self._computations.get(name, {}).values():
      yield instruction
      yield from self._nested(called_computation(instruction, "calls"))

  def _fused(self, fusion: Instruction) -> Computation:
    """Returns the computation of a fusion, {} if the text has none."""
    return self._computations.get(called_computation(fusion, "calls") or "", {})

  def _traffic(self, table: Computation, instruction: Instruction) -> float:
    """Returns the bytes of HBM that an instruction reads and writes, a fusion as a whole."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
      return 0.0
    read = [size(table[name].type, memory=True) for name in instruction.operands if name in table]
    if opcode == "dynamic-slice":
      return 2 * size(instruction.type, memory=True)
    if opcode == "dynamic-update-slice":
      return 2 * read[1] if len(read) > 1 else 0.0
    if opcode == "slice-start":  # Moves a slice of an array to another memory.
      return _moved(instruction)
    if opcode.endswith("-start"):  # Its type repeats the operands.
      return sum(read) + max(0.0, size(instruction.type, memory=True) - sum(read))
    written = size(instruction.type, memory=True)
    if opcode == "fusion":
      read, written = self._sliced(instruction, read, written)
    return sum(read) + written

  def _sliced(
    self, fusion: Instruction, read: list[float], written: float
  ) -> tuple[list[float], float]:
    """Returns the bytes that a fusion reads of each operand, and the bytes that it writes.

    If it reads only slices of an operand, the slices count; if it only updates a result, the
    update.
    """
    inner = self._fused(fusion)
    for instruction in inner.values():
      if instruction.opcode == "parameter" and int(instruction.argument) < len(read):
        number = int(instruction.argument)
        read[number] = min(read[number], self._touched(inner, instruction))
    root = next((instruction for instruction in inner.values() if instruction.root), None)
    if root is None:
      return read, written
    results = [root]
    if root.opcode == "tuple":
      results = [inner[name] for name in root.operands if name in inner]
    outer = shapes(fusion.type)
    if len(results) != len(outer):
      return read, written
    return read, sum(
      self._renewed(inner, result) for result, (_, _, in_memory) in zip(results, outer) if in_memory
    )

  def _touched(self, table: Computation, array: Instruction) -> float:
    """Returns the bytes of an array that its users in a fusion read; infinite for the whole array.

    TPU fusions contain fusions: the slice of a stack, and its conversion, is one of them.
    """
    if array.root:
      return math.inf
    # What a fusion only hands on, and what a collective in it moves, is no traffic of the fusion.
    total = 0.0
    users = (instruction for instruction in table.values() if array.name in instruction.operands)
    for user in users:
      if user.opcode in ("dynamic-slice", "slice") or (
        user.opcode == "gather" and array.name not in user.operands[1:]
      ):
        total += size(user.type)
      elif user.opcode in COLLECTIVES or user.opcode == "tuple" and user.root:
        continue
      elif user.opcode == "bitcast":
        total += self._touched(table, user)
      elif user.opcode == "fusion":
        inner = self._fused(user)
        total += sum(
          self._touched(inner, parameter)
          for parameter in inner.values()
          if parameter.opcode == "parameter"
          and user.operands[int(parameter.argument)] == array.name
        )
      elif user.opcode != "dynamic-update-slice" or array.name in user.operands[1:]:
        return math.inf
    return total

  def _renewed(self, table: Computation, result: Instruction) -> float:
    """Returns the bytes that a fusion writes of a result; only the update if it is in place."""
    if result.opcode in COLLECTIVES or result.opcode == "parameter":
      return 0.0
    if result.opcode == "bitcast" and result.operands[0] in table:
      return self._renewed(table, table[result.operands[0]])
    if result.opcode == "dynamic-update-slice" and table[result.operands[0]].opcode == "parameter":
      return size(table[result.operands[1]].type)
    return size(result.type)


def _moved(start: Instruction) -> float:
  """Returns the bytes of HBM that an asynchronous slice reads and writes.

  Its type is ((the array), the slice, a flag).
  """
  (_, _, read), (dtype, dims, written), *_ = shapes(start.type)
  accesses = [read, written].count(True)
  return accesses * math.prod(dims) * BITS.get(dtype, 8) / 8


def _callees(instruction: Instruction) -> list[str | None]:
  """Returns the computations that an instruction runs."""
  if instruction.opcode == "while":
    return [called_computation(instruction, "body")]
  if instruction.opcode == "conditional":
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    return (
      NAME.findall(branches[1])
      if branches
      else [called_computation(instruction, "true_computation")]
    )
  return [called_computation(instruction, "to_apply" if instruction.opcode == "call" else "calls")]


def products(table: Computation, instruction: Instruction) -> float:
  """Counts the operations, 2 x multiply-adds, of a dot, a convolution or a Pallas kernel.

  TPUs compute every matrix product as a convolution. A Pallas kernel counts by its own estimate,
  which in JAX's flash attention the forward kernel has and the two backward kernels lack.

  Args:
    table: computation of the instruction.
    instruction: any instruction; those of other kinds count 0.
  """
  if instruction.opcode == "custom-call":
    estimate = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.attributes)
    return float(estimate[1]) if estimate else 0.0
  if instruction.opcode not in ("dot", "convolution"):
    return 0.0
  output = shapes(instruction.type)[0][1]
  left, right = (shapes(table[name].type)[0][1] for name in instruction.operands[:2])
  if instruction.opcode == "dot":
    contracted = _attribute(r"lhs_contracting_dims=\{([\d,]*)\}", instruction)[1]
    return 2.0 * math.prod(output) * math.prod(left[int(i)] for i in contracted.split(",") if i)
  lhs, rhs, out = _attribute(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction).groups()
  group_count = re.search(r"batch_group_count=(\d+)", instruction.attributes)
  groups = int(group_count[1]) if group_count else 1
  window = _window(instruction.attributes)
  total = 2.0 * output[out.index("b")] * output[out.index("f")] * right[rhs.index("i")] / groups
  for i, label in enumerate(sorted(set(lhs) - set("bf"))):
    total *= _pairs(
      left[lhs.index(label)], right[rhs.index(label)], output[out.index(label)], window, i
    )
  return total


def _attribute(pattern: str, instruction: Instruction) -> re.Match[str]:
  """Returns the match of an attribute that instructions of this opcode always have."""
  match = re.search(pattern, instruction.attributes)
  assert match is not None, instruction
  return match


def _window(attributes: str) -> dict[str, str]:
  """Returns {"size": "16x12", ...} of window={...}."""
  match = re.search(r"window=\{([^}]*)\}", attributes)
  return dict(part.split("=") for part in match[1].split()) if match else {}


def _pairs(inputs: int, kernel: int, outputs: int, window: dict[str, str], i: int) -> int:
  """Counts the pairs of an output and a kernel position that meet an input in a window dimension.

  Positions in the padding or in gaps of a dilation do not count. A batch dimension of a product is
  one in which every output meets one input.
  """

  def value(name: str, default: str) -> str:
    return window[name].split("x")[i] if name in window else default

  stride, dilation, kernel_dilation = (
    int(value(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")
  )
  low = int(value("pad", "0_0").split("_")[0])
  # position = out * stride + k * kernel_dilation - low must be a multiple of dilation, and within
  # the inputs: out is in a range, and one of every `step` numbers. In closed form, because a batch
  # may be such a dimension, with thousands of kernel positions and of outputs.
  shared = math.gcd(stride, dilation)
  step = dilation // shared
  inverse = pow(stride // shared, -1, step) if step > 1 else 0
  count = 0
  for k in range(kernel):
    rest = low - k * kernel_dilation
    if rest % shared:
      continue
    first = max(0, -(-rest // stride))
    last = min(outputs - 1, (rest + (inputs - 1) * dilation) // stride)
    first += (rest // shared * inverse - first) % step
    count += max(0, (last - first) // step + 1)
  return count


def _collective(table: Computation, instruction: Instruction) -> dict[tuple[str, str], float]:
  """Returns the count, bytes of the whole array and bytes that a device sends on a ring."""
  kind = instruction.opcode.removesuffix("-start")
  if kind not in COLLECTIVES:
    return {}
  operands = sum(size(table[name].type) for name in instruction.operands if name in table)
  results = size(instruction.type)
  if instruction.opcode.endswith("-start") and kind != "all-reduce":
    results = max(0.0, results - operands)
  total = max(operands, results)
  members = _members(instruction.attributes)
  share = (members - 1) / members if members > 1 else 0.0
  if kind == "collective-permute":
    sent = total
  elif kind == "all-reduce":
    sent = 2 * total * share
  else:
    sent = total * share
  return {(kind, "count"): 1, (kind, "bytes"): total, (kind, "sent"): sent}


def _members(attributes: str) -> int:
  """Returns the number of devices in a group of a collective."""
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
    return int(iota[2])
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return len(listed[1].split(","))
  return 2
