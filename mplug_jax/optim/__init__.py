"""Optimizer groups by regular expression, and the optimizers.

`make(config.optim, params, total_steps, steps_per_epoch)` reads

    name          "adamw" (default) | "adafactor" | "muon"
    lr            base learning rate
    visual_lr     learning rate of the visual encoder, read only by groups="official"
    weight_decay  decoupled, multiplied by the learning rate (as in torch.optim.AdamW)
    b1, b2, eps   decays of the moments, constant of the denominator (0.9, 0.999, 1e-8);
                  adafactor reads b1 only
    momentum      of the matrices that "muon" orthogonalizes (0.95)
    mu_dtype      dtype of the first moment (default "float32"; "bfloat16" halves its memory)
    clip          largest global gradient norm; 0 or None for no clipping
    groups        "plain" (default) | "official" | rows, see `resolve_groups`
    schedule      {"name": "constant" | "cosine" | "linear" | "official", ...}: see schedules.py
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from mplug_jax.config import Config
from mplug_jax.optim import muon
from mplug_jax.optim.adafactor import adafactor
from mplug_jax.optim.adamw import adamw
from mplug_jax.optim.groups import Group, clip_factor, resolve_groups
from mplug_jax.optim.schedules import Schedule, make_schedule
from mplug_jax.parallel.rules import path_name


def _muon(
  paths: Sequence[str],
  groups: list[Group],
  schedules: dict[str, Schedule],
  *,
  momentum: float = 0.95,
  clip: float | None = None,
  **adamw_settings: Any,
) -> optax.GradientTransformationExtraArgs:
  """Muon for the kernels, AdamW for embeddings, biases and scales."""
  matrices = [
    path.endswith("/kernel") and not group.freeze for path, group in zip(paths, groups, strict=True)
  ]
  rest = [group for group, matrix in zip(groups, matrices, strict=True) if not matrix]
  return muon.muon(
    adamw(rest, schedules, **adamw_settings),
    matrices,
    groups,
    schedules,
    momentum=momentum,
    clip_factor=lambda grads: clip_factor(grads, groups, clip),
  )


def make(
  config: Config, params: Any, total_steps: int, steps_per_epoch: int
) -> tuple[optax.GradientTransformationExtraArgs, dict[str, Schedule]]:
  """Makes the optimizer of a run.

  Args:
    config: config.optim, see the top of this file.
    params: the parameters, or their abstract shapes.
    total_steps: updates of the whole run.
    steps_per_epoch: updates in one pass over the data.

  Returns:
    The transformation, and {group name: schedule} to report. `update(grads, state, params,
    ok=bool[])` needs the parameters; if `ok` is False it changes nothing, whatever the gradients.

  Raises:
    ValueError: an optimizer, schedule, table or field is unknown, or parameters or rows are left
      over.
  """
  paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
  groups = resolve_groups(config, paths)
  rates = {group.name: group.lr for group in groups if not group.freeze}
  if not rates:
    raise ValueError("optim.groups freezes every parameter.")
  schedules = {
    name: make_schedule(config["schedule"], lr, total_steps, steps_per_epoch)
    for name, lr in rates.items()
  }
  name = config.get("name") or "adamw"
  optimizers: dict[str, tuple[Callable[..., optax.GradientTransformationExtraArgs], str]] = {
    "adamw": (adamw, "b1 b2 eps mu_dtype clip"),
    "adafactor": (adafactor, "b1 mu_dtype clip"),
    "muon": (functools.partial(_muon, paths), "b1 b2 eps mu_dtype clip momentum"),
  }
  if name not in optimizers:
    raise ValueError(f"optim.name is {name!r}; known optimizers: {', '.join(sorted(optimizers))}.")
  optimizer, fields = optimizers[name]
  settings = {k: config[k] for k in fields.split() if config.get(k) is not None}
  return optimizer(groups, schedules, **settings), schedules
