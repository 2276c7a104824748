"""Optimizer groups by regular expression, and the optimizers.

`make(config.optim, params, total_steps, steps_per_epoch)` reads

    name          "adamw" (default) | "adafactor" | "muon"
    lr            base learning rate
    visual_lr     learning rate of the visual encoder, read by groups="official" alone
    weight_decay  decoupled, multiplied by the learning rate (as in torch.optim.AdamW)
    b1, b2, eps   decays of the moments, constant of the denominator (0.9, 0.999, 1e-8);
                  adafactor reads b1 alone
    momentum      of the matrices that "muon" makes orthogonal (0.95)
    mu_dtype      dtype of the first moment (default "float32"; "bfloat16" halves its memory)
    clip          largest global gradient norm; 0 or None for no clipping
    groups        "plain" (default) | "official" | rows, see `resolve_groups`
    schedule      {"name": "constant" | "cosine" | "linear" | "official", ...}: see schedules.py
"""

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mplug_jax.config import check_fields
from mplug_jax.optim import muon
from mplug_jax.optim.schedules import Schedule, make_schedule

_ROW_FIELDS = {"group", "lr", "lr_mult", "weight_decay", "freeze", "optional"}


@dataclasses.dataclass(frozen=True)
class Group:
  """Settings of one parameter; `name` is what its learning rate is reported under."""

  name: str
  lr: float
  weight_decay: float
  freeze: bool


class AdamWState(NamedTuple):
  """count i32[] updates done; mu, nu trees like the parameters, optax.MaskedNode where frozen."""

  count: jax.Array
  mu: Any
  nu: Any


class AdafactorState(NamedTuple):
  """count i32[] updates done; inner, the state of optax's stages."""

  count: jax.Array
  inner: Any


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


def _clip_factor(grads: list, groups: list[Group], clip: float | None):
  """f32[] min(1, clip / (norm + 1e-6)) over what is trained, as torch clips; 1 without `clip`."""
  if not clip:
    return 1.0
  norm = optax.tree.norm([g for g, group in zip(grads, groups, strict=True) if not group.freeze])
  return jnp.minimum(1.0, clip / (norm + 1e-6))


def adamw(
  groups: list[Group],
  schedules: dict[str, Schedule],
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  mu_dtype: str = "float32",
  clip: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  """AdamW with groups, without intermediate trees (Loshchilov and Hutter 2019, Algorithm 2).

  p -= lr (m_hat / (sqrt(v_hat) + eps) + weight_decay p), the form of torch.optim.AdamW. Gradients
  are first scaled to a global norm of at most `clip`. Frozen parameters own no moments and do not
  count in the norm.

  Args:
    groups: one per parameter, in the order of jax.tree.leaves.
    schedules: {group name: learning rate as a function of the number of updates done}.
    b1, b2, eps: decays of the two moments, constant of the denominator.
    mu_dtype: dtype in which the first moment is kept; arithmetic is float32.
    clip: largest global norm of the gradients.
  """

  def moment(params, dtype):
    leaves, tree = jax.tree.flatten(params)
    return tree.unflatten(
      optax.MaskedNode() if group.freeze else jnp.zeros_like(p, dtype)
      for p, group in zip(leaves, groups, strict=True)
    )

  def init(params):
    mu, nu = moment(params, jnp.dtype(mu_dtype)), moment(params, jnp.float32)
    return AdamWState(jnp.zeros([], jnp.int32), mu, nu)

  def update(grads, state, params, *, ok=True):
    leaves, tree = jax.tree.flatten(params)
    grads, mu, nu = (tree.flatten_up_to(x) for x in (grads, state.mu, state.nu))
    factor = _clip_factor(grads, groups, clip)
    # The update is made from moments that already heed `ok`. Were it chosen afterwards, XLA would copy both moments of
    # every parameter before it overwrites them: the memory of two more models.
    lrs = {name: jnp.where(ok, schedule(state.count), 0.0) for name, schedule in schedules.items()}
    # 1 - b^t without the cancellation that costs four digits at t = 1.
    mu_scale, nu_scale = (-1.0 / jnp.expm1((state.count + 1) * math.log(b)) for b in (b1, b2))
    updates = [jnp.zeros_like(p) for p in leaves]
    for i, (p, group) in enumerate(zip(leaves, groups, strict=True)):
      if group.freeze:
        continue
      g = grads[i].astype(jnp.float32) * factor
      old = mu[i].astype(jnp.float32)
      m = jnp.where(ok, b1 * old + (1.0 - b1) * g, old)
      v = jnp.where(ok, b2 * nu[i] + (1.0 - b2) * jnp.square(g), nu[i])
      direction = m * mu_scale / (jnp.sqrt(v * nu_scale) + eps)
      updates[i] = (-lrs[group.name] * (direction + group.weight_decay * p)).astype(p.dtype)
      mu[i], nu[i] = m.astype(mu_dtype), v
    return tree.unflatten(updates), AdamWState(
      state.count + ok, tree.unflatten(mu), tree.unflatten(nu)
    )

  return optax.GradientTransformationExtraArgs(init, update)


def adafactor(
  groups: list[Group],
  schedules: dict[str, Schedule],
  *,
  b1: float = 0.9,
  mu_dtype: str = "float32",
  clip: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Adafactor with momentum, at Adam's learning rates (Shazeer and Stern 2018; Zhai et al. 2022).

  Factored second moments, each array's step clipped to a root mean square of 1 (layers stacked in
  one array share it), momentum `b1`, no scaling by the parameter's size; then
  p -= lr (step + weight_decay p). Arguments as in `adamw`.
  """
  stages = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
  if b1:
    stages.append(optax.ema(b1, debias=False, accumulator_dtype=jnp.dtype(mu_dtype)))

  def trained(tree):
    return jax.tree.structure(tree).unflatten(not group.freeze for group in groups)

  inner = optax.masked(optax.chain(*stages), trained)

  def init(params):
    return AdafactorState(jnp.zeros([], jnp.int32), inner.init(params))

  def update(grads, state, params, *, ok=True):
    factor = _clip_factor(jax.tree.leaves(grads), groups, clip)
    steps, inner_state = inner.update(
      jax.tree.map(lambda g: g * factor, grads), state.inner, params
    )
    lrs = {name: schedule(state.count) for name, schedule in schedules.items()}
    leaves, tree = jax.tree.flatten(params)
    updates = [
      jnp.zeros_like(p)
      if g.freeze
      else jnp.where(ok, -lrs[g.name] * (u + g.weight_decay * p), 0.0).astype(p.dtype)
      for u, p, g in zip(jax.tree.leaves(steps), leaves, groups, strict=True)
    ]
    inner_state = jax.tree.map(lambda new, old: jnp.where(ok, new, old), inner_state, state.inner)
    return tree.unflatten(updates), AdafactorState(state.count + ok, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def _muon(paths, groups, schedules, *, momentum=0.95, clip=None, **of_adamw):
  """Muon for the kernels, AdamW for embeddings, biases and scales."""
  matrices = [
    path.endswith("/kernel") and not group.freeze for path, group in zip(paths, groups, strict=True)
  ]
  rest = [group for group, matrix in zip(groups, matrices, strict=True) if not matrix]
  return muon.muon(
    adamw(rest, schedules, **of_adamw),
    matrices,
    groups,
    schedules,
    momentum=momentum,
    clip_factor=lambda grads: _clip_factor(grads, groups, clip),
  )


def make(
  config, params, total_steps: int, steps_per_epoch: int
) -> tuple[optax.GradientTransformationExtraArgs, dict[str, Schedule]]:
  """The optimizer of a run.

  Args:
    config: config.optim, see the top of this file.
    params: the parameters, or their abstract shapes.
    total_steps: updates of the whole run.
    steps_per_epoch: updates in one pass over the data.

  Returns:
    The transformation, and {group name: schedule} to report. `update(grads, state, params, ok=bool[])`
    needs the parameters; where `ok` is False it changes nothing, whatever the gradients hold.

  Raises:
    ValueError: unknown optimizer, schedule, table or field; parameters or rows left over.
  """
  paths = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]
  groups = resolve_groups(config, paths)
  rates = {group.name: group.lr for group in groups if not group.freeze}
  if not rates:
    raise ValueError("optim.groups freezes every parameter.")
  schedules = {
    name: make_schedule(config["schedule"], lr, total_steps, steps_per_epoch)
    for name, lr in rates.items()
  }
  name = config.get("name") or "adamw"
  taken = {
    "adamw": (adamw, "b1 b2 eps mu_dtype clip"),
    "adafactor": (adafactor, "b1 mu_dtype clip"),
    "muon": (functools.partial(_muon, paths), "b1 b2 eps mu_dtype clip momentum"),
  }
  if name not in taken:
    raise ValueError(f"optim.name is {name!r}; known optimizers: {', '.join(sorted(taken))}.")
  optimizer, fields = taken[name]
  settings = {k: config[k] for k in fields.split() if config.get(k) is not None}
  return optimizer(groups, schedules, **settings), schedules
