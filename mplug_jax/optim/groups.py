"""Parameter groups: regexes on parameter names with their learning rate and weight decay."""

import dataclasses
import re

import jax.numpy as jnp
import optax

from mplug_jax.config import check_fields

_ROW_FIELDS = {"group", "lr", "lr_mult", "weight_decay", "freeze", "optional"}


@dataclasses.dataclass(frozen=True)
class Group:
  """Settings of one parameter; `name` is what its learning rate is reported under."""

  name: str
  lr: float
  weight_decay: float
  freeze: bool


# ---- groups


def _named_table(name: str, config) -> list:
  """Rows of a table that comes with the package: together they cover any parameters."""
  decay = config.get("weight_decay") or 0.0
  if name == "plain":
    rows = [(r".*/kernel", {"weight_decay": decay}), (r".*", {"weight_decay": 0.0})]
  elif name == "official":
    if config.get("visual_lr") is None:
      raise ValueError('optim.groups="official" needs optim.visual_lr (of the visual encoder).')
    visual = {"group": "visual", "lr": config["visual_lr"]}
    # Names with "bias" or "LayerNorm.weight" do not decay (docs/official.md item 25). The second
    # is BERT's name: scales of CLIP's layer norms and of visn_layer_norm do decay, as do the
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


def _rows(config) -> list:
  """`config.groups` as rows (regex, fields), named tables put in place."""
  groups = config.get("groups") or "plain"
  rows = []
  for item in [groups] if isinstance(groups, str) else groups:
    rows += _named_table(item, config) if isinstance(item, str) else [(item[0], dict(item[1]))]
  for pattern, fields in rows:
    check_fields(f"optim.groups row {pattern!r}", fields, _ROW_FIELDS)
  return rows


def resolve_groups(config, paths: list[str]) -> list[Group]:
  """The group of every parameter.

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
    ValueError: a parameter that no row matches, a row that no parameter takes, or one group with
      two learning rates.
  """
  rows = _rows(config)
  taken = [
    next((i for i, (pattern, _) in enumerate(rows) if re.fullmatch(pattern, path)), None)
    for path in paths
  ]
  if left := [path for path, i in zip(paths, taken, strict=True) if i is None]:
    shown = ", ".join(left[:10]) + (", ..." if len(left) > 10 else "")
    raise ValueError(f"{len(left)} of {len(paths)} parameters match no optim.groups row: {shown}.")
  for i, (pattern, fields) in enumerate(rows):
    if i not in taken and not fields.get("optional"):
      raise ValueError(
        f"No parameter takes the optim.groups row {pattern!r}: the regex matches no whole path, "
        "or earlier rows match all of them."
      )
  groups, rates = [], {}
  for i in taken:
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


# ---- optimizers


def clip_factor(grads: list, groups: list[Group], clip: float | None):
  """f32[] min(1, clip / (norm + 1e-6)) over what is trained, as torch clips; 1 without `clip`."""
  if not clip:
    return 1.0
  norm = optax.tree.norm([g for g, group in zip(grads, groups, strict=True) if not group.freeze])
  return jnp.minimum(1.0, clip / (norm + 1e-6))
