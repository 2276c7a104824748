"""Breakdown of a compiled program's HBM traffic and products by part of the model.

XLA keeps the path of the traced operation in the metadata of an instruction, from which the part of
the model and the direction follow. An instruction that the compiler adds, and a fusion of several
paths, count for the path that they name.
"""

import csv
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mplug_jax.performance.tpu import hlo
from mplug_jax.performance.tpu.hlo_text import Instruction

_PARTS = ("visual_encoder", "text_encoder", "fusion_encoder", "text_decoder")
# (regex on the path, part of a layer); first match wins.
_LAYERS = (
  (r"crossattention_norm|attention_norm|output_norm|ln_\w+|/norm/", "norm"),
  (r"crossattention", "cross-attention"),
  (r"attention", "attention"),
  (r"mlp|intermediate|/output/|_feed_forward", "feed-forward"),
  (r"embedding|patch_embed", "embeddings"),
  (r"head", "head"),
  (r"jit\(dynamic_(update_)?index_in_dim\)|/while$", "saved activations"),
)
_MOVES = {
  "bitcast",
  "broadcast",
  "concatenate",
  "constant",
  "convert",
  "copy",
  "dynamic-slice",
  "dynamic-update-slice",
  "get-tuple-element",
  "iota",
  "pad",
  "parameter",
  "reshape",
  "slice",
  "transpose",
  "tuple",
}


class Row(NamedTuple):
  """Sum of the instructions of one kind.

  Attributes:
    part: part of the model, or "other".
    layer: part of its layers, or "other".
    direction: "forward", "backward", "recomputed", "update" for optimizer, averages, metrics and
      searches, or "unnamed" for what the compiler adds, mostly moves between memories.
    kind: "product", "kernel" (Pallas), "collective", "move" (changes no value), or "elementwise".
    count: executed instructions.
    traffic: bytes of HBM.
    flops: operations of products.
  """

  part: str
  layer: str
  direction: str
  kind: str
  count: float
  traffic: float
  flops: float


def rows(text: str) -> list[Row]:
  """Returns the rows of a program, those with most traffic first.

  Args:
    text: an optimized module, compiled.as_text().

  Raises:
    ValueError: see hlo.executions.
  """
  sums: dict[tuple[str, str, str, str], list[float]] = {}
  for execution in hlo.executions(text):
    if not execution.traffic and not execution.flops:
      continue
    path = _path(execution)
    total = sums.setdefault((*_place(path), _kind(execution)), [0.0, 0.0, 0.0])
    for i, value in enumerate((1, execution.traffic, execution.flops)):
      total[i] += execution.times * value
  return sorted((Row(*key, *total) for key, total in sums.items()), key=lambda row: -row.traffic)


def _path(execution: hlo.Execution) -> str:
  """Returns the path of the traced operation; of a fusion with a product, that of the product."""
  products = (x for x in execution.fused if x.opcode in ("convolution", "dot"))
  for instruction in (*products, execution.instruction, *execution.fused):
    if path := _op_name(instruction):
      return path
  return ""


def _op_name(instruction: Instruction) -> str:
  match = re.search(r'op_name="([^"]*)"', instruction.attributes)
  return match[1] if match else ""


def _place(path: str) -> tuple[str, str, str]:
  """Returns (part, layer, direction) of a path."""
  part = next((part for part in _PARTS if part in path), "other")
  layer = next((layer for regex, layer in _LAYERS if re.search(regex, path)), "other")
  if "rematted_computation" in path:
    direction = "recomputed"
  elif "transpose(" in path:
    direction = "backward"
  elif "jvp(" in path or part != "other":
    direction = "forward"
  else:
    direction = "update" if path else "unnamed"
  return part, layer if part != "other" else "other", direction


def _kind(execution: hlo.Execution) -> str:
  instruction = execution.instruction
  if execution.collectives:
    return "collective"
  if "tpu_custom_call" in instruction.attributes:
    return "kernel"
  if execution.flops:
    return "product"
  opcodes = {x.opcode.removesuffix("-start") for x in (instruction, *execution.fused)} - {"fusion"}
  return "move" if opcodes <= _MOVES else "elementwise"


def table(rows: Sequence[Row], largest: int = 30) -> list[str]:
  """Formats rows as lines of text: sums by direction, by kind, and the largest rows.

  Args:
    rows: result of the function `rows`.
    largest: number of rows to print one by one.
  """
  lines = []
  for name in ("part", "direction", "kind"):
    sums: dict[str, list[float]] = {}
    for row in rows:
      total = sums.setdefault(getattr(row, name), [0.0, 0.0])
      total[0] += row.traffic
      total[1] += row.flops
    for key, (traffic, flops) in sorted(sums.items(), key=lambda item: -item[1][0]):
      lines.append(f"  {name:<10} {key:<16} {traffic / 1e9:8.2f} GB {flops / 1e12:8.3f} TFLOP")
  for row in rows[:largest]:
    names = f"{row.part:<15} {row.layer:<18} {row.direction:<11} {row.kind:<12}"
    lines.append(
      f"  {names} {row.count:7.0f} x {row.traffic / 1e9:7.2f} GB {row.flops / 1e12:7.3f} TFLOP"
    )
  return lines


def write_csv(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
  """Writes the rows to a new CSV file.

  Args:
    path: file that does not exist.
    rows: result of the function `rows`.

  Raises:
    FileExistsError: the file exists.
  """
  with open(path, "x", newline="") as file:
    writer: Any = csv.writer(file)
    writer.writerow(Row._fields)
    writer.writerows(rows)
