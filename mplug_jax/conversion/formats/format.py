r"""Description of one foreign checkpoint format, and the kinds of its table rows.

A row is (regex on the whole table name of a tensor, target, kind). For kinds of KINDS the target is
a path of ours: `\1` is the regex's group, `[\1]` an index on a leading depth axis, `<\1>` a fusion
layer in the source's numbering. A tuple of targets: one tensor that initializes several leaves,
those of them that the model has; the export reads the first. For other kinds the target is a text
that describes the tensor.
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]  # {table name of a tensor: its shape}
Geometry = dict[str, Any]  # fields of MPlug
Rows = tuple[tuple[str, Any, str], ...]


class Placement(NamedTuple):
  """Mapping of the layers and parts of one file to a model.

  Attributes:
    first_fusion_layer: the source's index of the model's first fusion layer.
    leaves_new: regexes of leaves that the source lacks although it has their part of the model.
    absent: path prefixes of parts that the source does not fill.
    spare_layer: reason for dropping a layer beyond a part's depth; "" makes such a layer an error.
  """

  first_fusion_layer: int
  leaves_new: tuple[str, ...] = ()
  absent: tuple[str, ...] = ()
  spare_layer: str = ""


class Format(NamedTuple):
  """Everything that conversion needs of one foreign format.

  Attributes:
    name: key of the format.
    title: name for messages, with the beginnings of its tensor names.
    sign: regex of tensor names that only this format has.
    rows: table rows, see the module docstring.
    geometry: ({table name: shape}, overriding fields) -> fields of MPlug, {} for other tensors.
    placement: (table names, fields of MPlug) -> Placement.
    table_prefix: beginning of table names that selects these rows; "" for the official names.
    bare: regex of names that some files save without `prefix`.
    prefix: what the table's names have before the bare ones.
    renames: (regex, replacement) pairs of other spellings of the names.
    family: first word of `model_type` in a config.json beside the weights; "" if there is none.
    activation: the `hidden_act` that our layers compute.
    config_section: entry of config.json with the fields, where it has one.
    config_fields: (attention heads, width) of config.json -> fields of MPlug.
    vision_position_ids: table name of the numbers 0, 1, ... of the image encoder's positions.
  """

  name: str
  title: str
  sign: str
  rows: Rows
  geometry: Callable[[Shapes, Mapping[str, Any]], Geometry]
  placement: Callable[[Collection[str], Mapping[str, Any]], Placement]
  table_prefix: str = ""
  bare: str = ""
  prefix: str = ""
  renames: tuple[tuple[str, str], ...] = ()
  family: str = ""
  activation: str = ""
  config_section: str = ""
  config_fields: Callable[[int, int], Geometry] | None = None
  vision_position_ids: str = ""


# {kind: {rest of the PyTorch key: (rests of the leaves, forward, inverse)}}: forward takes the
# PyTorch array and returns the arrays of the leaves, inverse takes those and the PyTorch shape.
_ONE = (lambda x: (x,), lambda parts, shape: parts[0])
_TRANSPOSED = (lambda x: (x.T,), lambda parts, shape: parts[0].T)
_QKV = ("/query/", "/key/", "/value/")
KINDS = {
  "copy": {"": (("",), *_ONE)},
  "linear": {".weight": (("/kernel",), *_TRANSPOSED), ".bias": (("/bias",), *_ONE)},
  "norm": {".weight": (("/scale",), *_ONE), ".bias": (("/bias",), *_ONE)},
  # Convolution weight [out, 3, p, p] <-> matrix over flattened patches [p * p * 3, out].
  "patches": {
    "": (
      ("",),
      lambda x: (x.transpose(2, 3, 1, 0).reshape(-1, len(x)),),
      lambda parts, shape: (
        parts[0].reshape(shape[2], shape[3], shape[1], shape[0]).transpose(3, 2, 0, 1)
      ),
    )
  },
  "qkv": {
    "_weight": (
      tuple(f"{name}kernel" for name in _QKV),
      lambda x: tuple(part.T for part in np.split(x, 3)),
      lambda parts, shape: np.concatenate([part.T for part in parts]),
    ),
    "_bias": (
      tuple(f"{name}bias" for name in _QKV),
      lambda x: tuple(np.split(x, 3)),
      lambda parts, shape: np.concatenate(parts),
    ),
  },
}


@functools.lru_cache(maxsize=32)
def _compiled(rows: Rows) -> tuple[tuple[re.Pattern[str], Any, str], ...]:
  return tuple(
    (
      re.compile(regex + "(?P<rest>" + "|".join(map(re.escape, KINDS.get(kind, [""]))) + ")"),
      target,
      kind,
    )
    for regex, target, kind in rows
  )


def find_row(table: Format, key: str) -> tuple[tuple[str, ...] | str, str, str]:
  """Finds the table row of a tensor.

  Args:
    table: the format.
    key: table name of the tensor.

  Returns:
    (targets, or the description of a tensor that is not a parameter; kind; rest of the name after
    the row's regex).

  Raises:
    KeyError: the name does not match exactly one row.
  """
  return _find_row(table.rows, key)


@functools.lru_cache(maxsize=8192)  # a conversion asks for each tensor several times
def _find_row(rows: Rows, key: str) -> tuple[tuple[str, ...] | str, str, str]:
  """Returns what `find_row` returns."""
  matches = [
    (m, target, kind) for regex, target, kind in _compiled(rows) if (m := regex.fullmatch(key))
  ]
  if len(matches) != 1:
    raise KeyError(
      f"PyTorch tensor {key!r} matches {len(matches)} rows of the conversion table, "
      "it should match exactly one."
    )
  match, target, kind = matches[0]
  if kind not in KINDS:
    return match.expand(target), kind, ""
  return (
    tuple(map(match.expand, (target,) if isinstance(target, str) else target)),
    kind,
    match["rest"],
  )


def layers(shapes: Collection[str], regex: str) -> int:
  """Returns the number of layers, from the layer numbers in the tensor names.

  Args:
    shapes: table names of all tensors.
    regex: matches the names of a layer; its group is the layer's number.

  Raises:
    ValueError: a layer number exceeds the number of tensors.
  """
  count = 1 + max((int(m[1]) for name in shapes if (m := re.match(regex, name))), default=-1)
  if count > len(shapes):
    raise ValueError(
      f"The tensors' names number layers up to {count - 1}, but there are {len(shapes)} tensors; "
      "the file is damaged."
    )
  return count


def shape_of(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
  """Returns the shape of a tensor from which the geometry is inferred.

  Args:
    shapes: {table name: shape}.
    name: table name of the tensor.
    axes: the number of axes it must have.

  Raises:
    ValueError: the tensor is missing or has another number of axes.
  """
  if name not in shapes:
    raise ValueError(
      f"The tensor {name}, from which the model's geometry is inferred, is missing; "
      "get the complete file."
    )
  if len(shapes[name]) != axes:
    raise ValueError(
      f"The tensor {name} should have {axes} axes and has shape {list(shapes[name])}."
    )
  return shapes[name]
