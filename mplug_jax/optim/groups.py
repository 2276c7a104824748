"""Parameter groups: regexes on parameter names with their learning rate and weight decay."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mplug_jax.config import Config, check_fields

_ROW_FIELDS = {"group", "lr", "lr_mult", "weight_decay", "freeze", "optional"}


@dataclasses.dataclass(frozen=True)
class Group:
  """Settings of one parameter.

  Attributes:
    name: name under which the learning rate is reported.
    lr: base learning rate.
    weight_decay: decay, multiplied by the learning rate.
    freeze: whether the parameter is not trained.
  """

  name: str
  lr: float
  weight_decay: float
  freeze: bool


def _named_table(name: str, config: Config) -> list[tuple[str, dict[str, Any]]]:
  """Returns the rows of a table of this package, which match any parameter."""
  decay = config.get("weight_decay") or 0.0
  if name == "plain":
    rows = [(r".*/kernel", {"weight_decay": decay}), (r".*", {"weight_decay": 0.0})]
  elif name == "official":
    if config.get("visual_lr") is None:
      raise ValueError('optim.groups="official" needs optim.visual_lr (of the visual encoder).')
    visual = {"group": "visual", "lr": config["visual_lr"]}
    # Names with "bias" or "LayerNorm.weight" do not decay (docs/official.md item 25). The second is
    # BERT's name: scales of CLIP's layer norms and of visn_layer_norm do decay, as do the
    # temperature and every embedding.
    rows = [
      (r"visual_encoder/(.*/)?bias", {**visual, "weight_decay": 0.0}),
      (r"visual_encoder/.*", {**visual, "weight_decay": decay}),
      (r"visn_layer_norm/scale", {"weight_decay": decay}),
      (r"(.*/)?(bias|scale)", {"weight_decay": 0.0}),
      (r".*", {"weight_decay": decay}),
    ]
  else:
    raise ValueError(f"optim.groups names {name!r}; known tables: official, plain.")
  return [(pattern, {**fields, "optional": True}) for pattern, fields in rows]


def _rows(config: Config) -> list[tuple[str, dict[str, Any]]]:
  """Returns `config.groups` as rows (regex, fields), with named tables expanded."""
  groups = config.get("groups") or "plain"
  rows: list[tuple[str, dict[str, Any]]] = []
  for item in [groups] if isinstance(groups, str) else groups:
    rows += _named_table(item, config) if isinstance(item, str) else [(item[0], dict(item[1]))]
  for pattern, fields in rows:
    check_fields(f"optim.groups row {pattern!r}", fields, _ROW_FIELDS)
  return rows


def resolve_groups(config: Config, paths: Sequence[str]) -> list[Group]:
  """Returns the group of each parameter.

  Args:
    config: config.optim. `groups` is the name of a table, or a list of rows [regex, fields] and
      names of tables. A regex must match the whole path; the first match wins. Fields: `group`
      (name, default "main"), `lr` or `lr_mult` (times config.lr, default 1), `weight_decay`
      (default config.weight_decay), `freeze` (no update and no optimizer state), `optional` (may
      match nothing).
    paths: parameter paths such as "text_decoder/layers/output/kernel".

  Returns:
    One Group per path, in order.

  Raises:
    ValueError: a parameter matches no row, a row is used by no parameter, or one group has two
      learning rates.
  """
  rows = _rows(config)
  used = _first_rows(rows, paths)
  for i, (pattern, fields) in enumerate(rows):
    if i not in used and not fields.get("optional"):
      raise ValueError(
        f"No parameter takes the optim.groups row {pattern!r}: the regex matches no whole path, "
        "or earlier rows match all of them."
      )
  groups: list[Group] = []
  rates: dict[str, float] = {}
  for i in used:
    fields = rows[i][1]
    lr = fields["lr"] if "lr" in fields else config["lr"] * fields.get("lr_mult", 1.0)
    decay = fields.get("weight_decay", config.get("weight_decay") or 0.0)
    group = Group(fields.get("group", "main"), lr, decay, bool(fields.get("freeze")))
    if not group.freeze and rates.setdefault(group.name, lr) != lr:
      raise ValueError(
        f"optim.groups: group {group.name!r} has two learning rates, {rates[group.name]} and {lr};"
        " give one of them another `group` name."
      )
    groups.append(group)
  return groups


def _first_rows(rows: Sequence[tuple[str, Any]], paths: Sequence[str]) -> list[int]:
  """Returns the number of the first matching row of each path."""
  used = []
  unmatched = []
  for path in paths:
    for i, (pattern, _) in enumerate(rows):
      if re.fullmatch(pattern, path):
        used.append(i)
        break
    else:
      unmatched.append(path)
  if unmatched:
    shown = ", ".join(unmatched[:10]) + (", ..." if len(unmatched) > 10 else "")
    raise ValueError(
      f"{len(unmatched)} of {len(paths)} parameters match no optim.groups row: {shown}."
    )
  return used


def clip_factor(
  grads: Sequence[jax.Array], groups: Sequence[Group], clip: float | None
) -> Float[Array, ""] | float:
  """Returns the factor that clips gradients by their global norm, as PyTorch computes it.

  Args:
    grads: gradients of all parameters; those of frozen ones do not count.
    groups: group of each parameter.
    clip: largest global norm; None or 0 for no clipping.

  Returns:
    min(1, clip / (norm + 1e-6)) f32[], or 1.0 without clipping.
  """
  if not clip:
    return 1.0
  norm = optax.tree.norm([g for g, group in zip(grads, groups, strict=True) if not group.freeze])
  return jnp.minimum(1.0, clip / (norm + 1e-6))
