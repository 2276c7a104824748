"""Numbers of a config: sign, range and finiteness."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug_jax import config as config_lib
from mplug_jax.optim import schedules

TASKS = ("vqa", "caption", "retrieval", "grounding", "pretrain", "nlvr2", "snli_ve")


def changed(task, name, value):
  """Returns a config with one changed value."""
  config = config_lib.load(f"configs/{task}.py:tiny").unlock()
  *sections, key = name.split(".")
  owner = config
  for section in sections:
    owner = owner[section]
  with owner.ignore_type():
    owner[key] = value
  return config


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", ["tiny", "base"])
def test_packaged_configs_pass(task, size):
  config_lib.check(config_lib.load(f"configs/{task}.py:{size}"))


@pytest.mark.parametrize(
  ("task", "name", "value", "rule"),
  [
    ("vqa", "optim.lr", -1.0, "must be at least 0"),
    ("vqa", "optim.lr", math.nan, "must be a finite number"),
    ("vqa", "optim.lr", math.inf, "must be a finite number"),
    ("vqa", "optim.visual_lr", -1e-5, "must be at least 0"),
    ("vqa", "optim.weight_decay", -0.1, "must be at least 0"),
    ("vqa", "optim.clip", -1.0, "must be at least 0"),
    ("vqa", "optim.clip", math.nan, "must be a finite number"),
    ("vqa", "optim.b1", 1.0, "must be at least 0 and below 1"),
    ("vqa", "optim.b2", 1.5, "must be at least 0 and below 1"),
    ("vqa", "optim.momentum", -0.1, "must be at least 0 and below 1"),
    ("vqa", "optim.eps", 0.0, "must be above 0"),
    ("vqa", "optim.schedule.warmup_steps", -1, "must be at least 0"),
    ("vqa", "ema.decay", 1.0, "must be at least 0 and below 1"),
    ("vqa", "model.dropout_rate", 1.0, "must be at least 0 and below 1"),
    ("vqa", "model.attention_dropout_rate", -0.1, "must be at least 0 and below 1"),
    ("vqa", "model.temperature", 0.0, "must be above 0"),
    ("vqa", "model.initializer_range", math.inf, "must be a finite number"),
    ("vqa", "batch_size", 0, "must be at least 1"),
    ("vqa", "eval.batch_size", -8, "must be at least 1"),
    ("vqa", "eval.limit", -1, "must be at least 0"),
    ("vqa", "total_steps", -5, "must be at least 0"),
    ("vqa", "checkpoint.keep", 0, "must be at least 1"),
    ("vqa", "loader.threads", -1, "must be at least 0"),
    ("vqa", "seed", -1, "must be at least 0"),
    ("vqa", "data.augment.flip", 1.5, "must be at least 0 and at most 1"),
    ("vqa", "data.augment.scale", (0.5, math.nan), "must be a finite number"),
    ("vqa", "data.augment.scale", (0.0, 1.0), "must be above 0"),
    ("vqa", "data.augment.scale", (1.0, 0.5), "must be a smallest and a largest share"),
    ("vqa", "data.questions_per_image", 0, "must be at least 1"),
    ("vqa", "task.beams", 0, "must be at least 1"),
    ("vqa", "task.distill.alpha", 1.5, "must be at least 0 and at most 1"),
    ("caption", "task.max_length", 0, "must be at least 1"),
    ("pretrain", "data.mask_probability", -0.1, "must be at least 0 and at most 1"),
    ("pretrain", "data.weights", (1.0, -1.0), "must be at least 0"),
    ("pretrain", "task.coefficients.itc", math.nan, "must be a finite number"),
    ("retrieval", "task.queue", -1, "must be at least 0"),
    ("grounding", "task.bins", 0, "must be at least 1"),
    ("nlvr2", "data.swap", math.nan, "must be a finite number"),
  ],
)
def test_a_number_out_of_its_range_is_refused_with_its_key(task, name, value, rule):
  with pytest.raises(ValueError, match=rule) as error:
    config_lib.check(changed(task, name, value))
  assert str(error.value).startswith(f"config.{name}=")


@pytest.mark.parametrize(
  ("name", "value"), [("optim.lr", math.nan), ("data.augment.scale", (0.5, math.inf))]
)
def test_a_config_with_such_a_number_is_not_written_as_json(name, value):
  with pytest.raises(ValueError, match=f"config.{name}=.* must be a finite number"):
    config_lib.to_json(changed("vqa", name, value))


@pytest.mark.parametrize("field", ["lr", "lr_mult", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_row_of_groups_is_checked(field, value):
  config = changed("vqa", "optim.groups", [[".*", {field: value}]])
  with pytest.raises(ValueError, match=f"config.optim.groups: {field}={value} of the row"):
    config_lib.check(config)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("optim.lr", 0.0),
    ("optim.clip", 0.0),
    ("optim.b1", 0.0),
    ("ema.decay", 0.9999),
    ("data.augment.scale", (1.0, 1.0)),
    ("data.augment.randaugment", (2, 7)),
    ("optim.groups", [[".*", {"freeze": True}], "plain"]),
    ("mesh.data", -1),
  ],
)
def test_values_at_the_ends_of_a_range_pass(name, value):
  config_lib.check(changed("vqa", name, value))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rate=st.floats(allow_nan=True, allow_infinity=True))
def test_a_schedule_takes_finite_rates_from_zero_on_and_no_others(rate):
  config = {"name": "constant"}
  if math.isfinite(rate) and rate >= 0:
    schedules.make_schedule(config, rate, 10, 5)
  else:
    with pytest.raises(ValueError, match="must be a finite number, at least 0"):
      schedules.make_schedule(config, rate, 10, 5)
