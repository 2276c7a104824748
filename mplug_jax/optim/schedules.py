"""Learning-rate schedules: functions of the number of updates done."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mplug_jax.config import Config, check_fields

# Function (number of updates done, int or i32[]) -> learning rate f32[].
Schedule: TypeAlias = Callable[[Any], Float[Array, "*shape"]]

# Updates between two changes of the learning rate in the warm-up (docs/official.md item 27).
OFFICIAL_WARMUP_UNIT = 100

_SMOOTH_FIELDS = {"warmup_steps", "warmup_epochs", "end_lr"}
_SCHEDULE_FIELDS = {
  "constant": _SMOOTH_FIELDS - {"end_lr"},
  "cosine": _SMOOTH_FIELDS,
  "linear": _SMOOTH_FIELDS,
  "official": {"warmup_units", "warmup_lr", "min_lr", "epochs"},
}


def make_schedule(config: Config, lr: float, total_steps: int, steps_per_epoch: int) -> Schedule:
  """Makes the function step -> learning rate of that update, counted from 0.

  Args:
    config: mapping with `name` and its fields. "constant", "cosine" and "linear" take
      `warmup_steps` or `warmup_epochs` (default 0; update s of W warm-up updates uses
      lr (s + 1) / W), the last two also `end_lr` (default 0, reached at `total_steps`).
      "official" takes the arguments of `official_schedule`.
    lr: the group's base learning rate.
    total_steps: updates of the whole run.
    steps_per_epoch: updates in one pass over the data.

  Returns:
    Function step (int or i32[...]) -> f32[...], usable inside jit.

  Raises:
    ValueError: the schedule or a field is unknown, the rate is negative or not finite, or the
      durations do not fit.
  """
  fields = dict(config)
  name = fields.pop("name")
  if name not in _SCHEDULE_FIELDS:
    known = ", ".join(sorted(_SCHEDULE_FIELDS))
    raise ValueError(f"optim.schedule.name is {name!r}; known schedules: {known}.")
  check_fields(f"optim.schedule {name!r}", fields, _SCHEDULE_FIELDS[name])
  if not (math.isfinite(lr) and lr >= 0):
    raise ValueError(f"The learning rate {lr!r} must be a finite number, at least 0.")
  if min(total_steps, steps_per_epoch) < 1:
    raise ValueError(f"{total_steps=} and {steps_per_epoch=} must be at least 1.")
  if name == "official":
    if missing := sorted(_SCHEDULE_FIELDS[name] - set(fields)):
      raise ValueError(f"optim.schedule 'official' needs {', '.join(missing)}.")
    return official_schedule(lr, steps_per_epoch=steps_per_epoch, **fields)
  if fields.get("warmup_steps") and fields.get("warmup_epochs"):
    raise ValueError("optim.schedule sets both warmup_steps and warmup_epochs; keep one.")
  warmup = fields.get("warmup_steps")
  warmup = warmup or round((fields.get("warmup_epochs") or 0) * steps_per_epoch)
  if not 0 <= warmup <= total_steps:
    raise ValueError(f"optim.schedule warms up for {warmup} steps; the run has {total_steps}.")
  return _smooth_schedule(name, lr, fields.get("end_lr") or 0.0, warmup, total_steps)


def _smooth_schedule(shape: str, lr: float, end_lr: float, warmup: int, total: int) -> Schedule:
  """Linear warm-up to `lr`, then constant, linear or half a cosine to `end_lr` at `total`."""

  def schedule(step: Any) -> Float[Array, "*shape"]:
    step = jnp.asarray(step, jnp.float32)
    remaining = jnp.clip((total - step) / max(total - warmup, 1), 0.0, 1.0)
    if shape == "cosine":
      remaining = 0.5 - 0.5 * jnp.cos(math.pi * remaining)
    after = lr if shape == "constant" else end_lr + (lr - end_lr) * remaining
    return jnp.where(step < warmup, lr * (step + 1.0) / max(warmup, 1), after)

  return schedule


def official_schedule(
  lr: float,
  *,
  steps_per_epoch: int,
  epochs: int,
  warmup_units: int,
  warmup_lr: float,
  min_lr: float,
) -> Schedule:
  """The official cosine, constant within an epoch (docs/official.md item 27).

  Its clock t advances in epoch 0 only with the warm-up: t = 1 after update 100, 2 after update 200,
  at most W = `warmup_units`. In epoch e > 0 it is e + W, wherever the warm-up ended. The value is
  warmup_lr + t (lr - warmup_lr) / W for t < W, then
  min_lr + (lr - min_lr) (1 + cos(pi (t - W) / epochs)) / 2, and min_lr from t = W + epochs on. The
  values are computed in float64 and looked up by t.

  Args:
    lr: base learning rate.
    steps_per_epoch: updates in one pass over the data.
    epochs: length of the cosine.
    warmup_units: length of the warm-up, in units of 100 updates.
    warmup_lr: learning rate at the start. A group with lr < warmup_lr warms down.
    min_lr: learning rate at the end.

  Returns:
    Function step (int or i32[...]) -> f32[...].
  """
  t = np.arange(warmup_units + epochs + 1)
  ramp = warmup_lr + t * (lr - warmup_lr) / max(warmup_units, 1)
  cosine = min_lr + 0.5 * (lr - min_lr) * (1.0 + np.cos(np.pi * (t - warmup_units) / epochs))
  values = np.where(t < warmup_units, ramp, cosine).astype(np.float32)
  values[-1] = min_lr

  def schedule(step: Any) -> Float[Array, "*shape"]:
    step = jnp.asarray(step, jnp.int32)
    epoch = step // steps_per_epoch
    warm = jnp.minimum(jnp.maximum(step - 1, 0) // OFFICIAL_WARMUP_UNIT, warmup_units)
    clock = jnp.where(epoch == 0, warm, epoch + warmup_units)
    return jnp.asarray(values)[jnp.minimum(clock, len(values) - 1)]

  return schedule
