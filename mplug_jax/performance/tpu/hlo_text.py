"""Parses the text of a compiled XLA program."""

import math
import re
from typing import NamedTuple

# Bits of an element.
BITS = {
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
NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{\s*$")
_START = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = ")


class Instruction(NamedTuple):
  """An instruction of a computation.

  Attributes:
    name: name in its computation.
    type: text of the type.
    opcode: text of the opcode.
    operands: names of instructions of the same computation.
    argument: text between the brackets.
    attributes: text after the brackets.
    root: whether it is the result of the computation.
  """

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  argument: str
  attributes: str
  root: bool


# Instructions of a computation by their names.
Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str | None]:
  """Parses a module.

  Args:
    text: an optimized module.

  Returns:
    {computation: {name: Instruction}}, and the name of the entry computation or None.
  """
  computations: dict[str, Computation] = {}
  entry = None
  current = None
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif current is not None and (start := _START.match(line)):
      current[start[2]] = _instruction(line[start.end() :], start[2], bool(start[1]))
  return computations, entry


def _instruction(rest: str, name: str, root: bool) -> Instruction:
  """Parses the part of a line after the name."""
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  kind = rest[:end]
  rest = rest[end:].lstrip()
  opening = rest.index("(")
  closing = _closing(rest, opening)
  argument = rest[opening + 1 : closing]
  return Instruction(
    name, kind, rest[:opening], tuple(NAME.findall(argument)), argument, rest[closing + 1 :], root
  )


def _closing(text: str, opening: int) -> int:
  """Returns the position of the bracket that closes the one at `opening`."""
  depth = 0
  for i in range(opening, len(text)):
    if text[i] == "(":
      depth += 1
    elif text[i] == ")":
      depth -= 1
    if not depth:
      return i
  raise ValueError(f"A bracket is not closed: {text[opening : opening + 80]}")


def shapes(kind: str) -> list[tuple[str, tuple[int, ...], bool]]:
  """Returns (dtype, dimensions, whether it is in HBM) of each array of a type.

  Args:
    kind: text of the type.
  """
  return [
    (dtype, tuple(int(n) for n in dims.split(",") if n), "S(" not in (layout or ""))
    for dtype, dims, layout in _ARRAY.findall(kind)
    if dtype in BITS or dtype.startswith("f8")
  ]


def size(kind: str, memory: bool = False) -> float:
  """Returns the bytes of all arrays of a type.

  Args:
    kind: text of the type.
    memory: whether to count only arrays in HBM, not those in on-chip memory.
  """
  return sum(
    math.prod(dims) * BITS.get(dtype, 8) / 8
    for dtype, dims, in_memory in shapes(kind)
    if in_memory or not memory
  )


def called_computation(instruction: Instruction, attribute: str) -> str | None:
  """Returns the computation that an attribute names, or None.

  Args:
    instruction: instruction that may call others.
    attribute: name of the attribute, such as "body".
  """
  match = re.search(rf"\b{attribute}=%([\w.\-]+)", instruction.attributes)
  return match[1] if match else None
