"""Checkpoints: every bit comes back, on any mesh, and whatever fails leaves the last good one."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import textwrap

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mplug_jax import optim
from mplug_jax.checkpoints import errors, reading
from mplug_jax.checkpoints import manager as manager_lib
from tests.support.paths import ROOT


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: tuple
  ema_params: dict | None
  extra: tuple
  rng: jax.Array


def _mesh(*shape):
  devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
  return jax.sharding.Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def _shard(tree, mesh):
  """Matrices split over both axes, the rest replicated."""

  def place(x):
    spec = P("data", "fsdp") if len(x.shape) == 2 else P()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree.map(place, jax.eval_shape(lambda: tree))


def _state(seed=0, ema=False):
  keys = jax.random.split(jax.random.key(seed), 3)
  params = {
    "visual_encoder": {"kernel": jax.random.normal(keys[0], (8, 16))},
    "text_decoder": {
      "kernel": jax.random.normal(keys[1], (16, 8)),
      "bias": jax.random.normal(keys[2], (8,)).astype(jnp.bfloat16),
    },
  }
  config = {
    "lr": 1e-3,
    "mu_dtype": "bfloat16",
    "groups": [["visual_encoder/.*", {"freeze": True}], "plain"],
    "schedule": {"name": "constant"},
  }
  tx, _ = optim.make(config, params, 10, 10)
  opt_state = (tx.init(params), optax.EmptyState())
  ema_params = jax.tree.map(lambda p: p * 2, params) if ema else None
  return State(jnp.int32(seed), params, opt_state, ema_params, (), jax.random.key(seed + 1))


def _assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def _saved(workdir, steps, **options):
  manager = manager_lib.Manager(workdir, **options)
  for step in steps:
    manager.save(step, _state(step), {"position": 10 * step})
  manager.wait()
  return manager


def _closing(*args, **kwargs):
  return contextlib.closing(manager_lib.Manager(*args, **kwargs))


def _steps(workdir):
  return sorted(p.name for p in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize("ema", [False, True])
def test_every_bit_comes_back_on_another_mesh(tmp_path, ema):
  abstract = _shard(_state(3, ema), _mesh(4, 2))
  state = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), _state(3, ema), abstract)
  manager = manager_lib.Manager(tmp_path)
  assert manager.save(3, state, {"position": 96, "epoch": [1, "a"]})
  for mesh in (_mesh(4, 2), _mesh(1, 8), _mesh(1, 1)):
    wanted = _shard(state, mesh)
    restored, extra = manager.restore(wanted)
    _assert_same(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
      lambda x: x.sharding, wanted
    )
    assert extra == {"position": 96, "epoch": [1, "a"]}
  assert not manager.save(3, state, {})  # already there
  manager.close()


def test_arrays_may_be_donated_right_after_save(tmp_path):
  step = jax.jit(lambda x: x + 1.0, donate_argnums=0)
  x = step(jnp.zeros(1 << 22))
  manager = manager_lib.Manager(tmp_path)
  manager.save(1, {"x": x}, {})
  for _ in range(3):
    x = step(x)
  restored, _ = manager.restore(_shard({"x": jax.eval_shape(lambda: x)}, _mesh(1, 1)))
  manager.close()
  assert float(x[0]) == 4.0
  np.testing.assert_array_equal(restored["x"], np.ones(1 << 22))


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 3)])
def test_best_and_last_stay(tmp_path, mode, best):
  with _closing(tmp_path, keep=1, best_metric="accuracy", best_mode=mode) as manager:
    assert manager.best_step() is None
    assert manager.latest_step() is None
    scores = {1: 50.0, 2: 90.0, 3: 10.0, 4: float("nan"), 5: 60.0}
    for step, score in scores.items():
      manager.save(step, _state(step), {}, metrics={"accuracy": score, "loss": 1.0})
    manager.save(6, _state(6), {})  # not evaluated
    manager.wait()
    assert (manager.best_step(), manager.latest_step()) == (best, 6)
  assert _steps(tmp_path) == [str(best), "6"]
  with _closing(tmp_path, keep=1, best_metric="accuracy", best_mode=mode) as manager:
    assert (manager.best_step(), manager.latest_step()) == (best, 6)
    abstract = _shard(_state(), _mesh(1, 1))
    assert int(manager.restore(abstract)[0].step) == 6
    assert int(manager.restore(abstract, step=best)[0].step) == best


def test_keep_counts_the_last(tmp_path):
  _saved(tmp_path, [1, 2, 3, 4], keep=3).close()
  assert _steps(tmp_path) == ["2", "3", "4"]


@pytest.mark.parametrize(
  "damage", ["truncated arrays", "no metadata", "no metadata of arrays", "no json"]
)
def test_falls_back_when_newest_is_unreadable(tmp_path, caplog, damage):
  _saved(tmp_path, [1, 2], keep=2).close()
  newest = tmp_path / "checkpoints" / "2"
  if damage == "truncated arrays":
    for file in [p for p in newest.rglob("*") if p.parent.name == "d"]:
      file.write_bytes(file.read_bytes()[:20])
  elif damage == "no metadata":
    (newest / "state" / "_METADATA").unlink()
  elif damage == "no metadata of arrays":
    (newest / "state" / "array_metadatas" / "process_0").unlink()
  else:
    next((newest / "data").iterdir()).write_text('{"posi')
  manager = manager_lib.Manager(tmp_path, keep=2)
  with caplog.at_level(logging.WARNING):
    state, extra = manager.restore(_shard(_state(), _mesh(2, 1)))
  _assert_same(state, _state(1))
  assert extra == {"position": 10}
  assert "Checkpoint 2 cannot be read" in caplog.text
  assert "using 1 instead" in caplog.text
  assert manager.latest_step() == 1
  assert manager.save(2, _state(2), {})  # the step can be saved again
  manager.close()
  assert _steps(tmp_path) == ["1", "2", "unreadable-2"]


@pytest.mark.parametrize("content", [b"", b'{"acc', b"\x84\xff"])
def test_damaged_metrics_cost_only_themselves(tmp_path, caplog, content):
  manager = manager_lib.Manager(tmp_path, keep=2, best_metric="acc")
  for step in (1, 2):
    manager.save(step, _state(step), {}, {"acc": 0.5})
  manager.close()
  (tmp_path / "checkpoints" / "2" / "metrics" / "metrics").write_bytes(content)
  with caplog.at_level(logging.WARNING):
    manager = manager_lib.Manager(tmp_path, keep=2, best_metric="acc")
  assert "which cannot be read; the checkpoint stays" in caplog.text
  _assert_same(manager.restore(_shard(_state(), _mesh(2, 1)))[0], _state(2))
  assert manager.best_step() == 1
  assert manager.save(3, _state(3), {}, {"acc": 0.7})
  manager.close()


def test_metrics_that_are_not_finite_are_left_out_of_the_file(tmp_path):
  manager = manager_lib.Manager(tmp_path, keep=2, best_metric="acc")
  manager.save(1, _state(1), {}, {"acc": float("nan"), "loss": float("inf"), "recall": 0.5})
  manager.close()
  text = (tmp_path / "checkpoints" / "1" / "metrics" / "metrics").read_text()
  assert json.loads(text) == {"recall": 0.5}


def test_all_unreadable_or_none_says_so(tmp_path):
  manager = manager_lib.Manager(tmp_path, keep=2)
  abstract = _shard(_state(), _mesh(1, 1))
  with pytest.raises(FileNotFoundError, match="No checkpoint in"):
    manager.restore(abstract)
  manager.save(1, _state(1), {})
  manager.wait()
  with pytest.raises(FileNotFoundError, match="No checkpoint 7 in"):
    manager.restore(abstract, step=7)
  (tmp_path / "checkpoints" / "1" / "state" / "_METADATA").unlink()
  with pytest.raises(
    errors.CheckpointError, match="None of 1 checkpoints .* can be read; 1, the newest: "
  ):
    manager.restore(abstract)
  manager.close()
  assert _steps(tmp_path) == ["1"]  # nothing is moved away when nothing else can be used


def test_another_configuration_is_refused_without_fallback(tmp_path):
  manager = _saved(tmp_path, [1, 2], keep=2)
  state = _state()
  other = state.replace(
    params=state.params | {"text_decoder": {"kernel": jnp.zeros((4, 8)), "scale": jnp.zeros(3)}}
  )
  with pytest.raises(ValueError, match="does not fit") as error:
    manager.restore(_shard(other, _mesh(1, 1)))
  manager.close()
  text = str(error.value)
  assert "checkpoints/2 does not fit" in text
  assert "1 missing in the checkpoint: params/text_decoder/scale;" in text
  assert "1 in the checkpoint alone: params/text_decoder/bias;" in text
  assert "params/text_decoder/kernel (16, 8) in the checkpoint, (4, 8) wanted" in text
  assert _steps(tmp_path) == ["1", "2"]


# ---- parameters alone


def test_load_params_from_every_kind_of_directory(tmp_path):
  state = _state(2, ema=True)
  manager = manager_lib.Manager(tmp_path, keep=2)
  manager.save(1, _state(1, ema=True), {})
  manager.save(2, state, {})
  manager.close()
  abstract = _shard(state.params, _mesh(2, 2))
  folder = tmp_path / "checkpoints"
  for path in (tmp_path, folder, folder / "2", folder / "2" / "state"):
    params = reading.load_params(path, abstract)
    _assert_same(params, state.params)
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(
      lambda x: x.sharding, abstract
    )
  _assert_same(reading.load_params(tmp_path, abstract, step=1), _state(1).params)
  _assert_same(reading.load_params(tmp_path, abstract, which="ema_params"), state.ema_params)


def test_load_params_reports_what_does_not_fit(tmp_path):
  _saved(tmp_path, [1]).close()
  mesh = _mesh(1, 1)
  abstract = _shard(_state().params, mesh)
  abstract["visual_encoder"]["kernel"] = _shard(jnp.zeros((8, 8)), mesh)
  abstract["itm_head"] = _shard({"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}, mesh)
  del abstract["text_decoder"]
  with pytest.raises(ValueError, match="missing in the checkpoint") as error:
    reading.load_params(tmp_path, abstract)
  text = str(error.value)
  assert "2 missing in the checkpoint: params/itm_head/bias, params/itm_head/kernel" in text
  assert "2 in the checkpoint alone: params/text_decoder/bias, params/text_decoder/kernel" in text
  assert "params/visual_encoder/kernel (8, 16) in the checkpoint, (8, 8) wanted" in text
  with pytest.raises(ValueError, match="holds no ema_params"):
    reading.load_params(tmp_path, abstract, which="ema_params")
  with pytest.raises(FileNotFoundError, match=r"No checkpoint 5 in .*there are \[1\]"):
    reading.load_params(tmp_path, abstract, step=5)
  with pytest.raises(FileNotFoundError, match="No such checkpoint"):
    reading.load_params(tmp_path / "nowhere", abstract)
  (tmp_path / "empty").mkdir()
  with pytest.raises(FileNotFoundError, match="neither a run directory"):
    reading.load_params(tmp_path / "empty", abstract)


def test_values_are_cast_to_the_wanted_dtype(tmp_path):
  _saved(tmp_path, [1]).close()
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _state(1).params)
  _assert_same(reading.load_params(tmp_path, _shard(half, _mesh(1, 1))), half)


# ---- a full disk, an interrupted save

_FULL_DISK = """
  import resource, sys
  import jax, jax.numpy as jnp
  from mplug_jax.checkpoints import manager as checkpoint

  def state(step):
    return {"x": jax.random.normal(jax.random.key(step), (1 << 18,))}

  manager = checkpoint.Manager(sys.argv[1])
  manager.save(1, state(1), {"position": 1})
  manager.wait()
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
  try:
    manager.save(2, state(2), {"position": 2})
    manager.wait()
  except checkpoint.CheckpointError as error:
    print(error)
  print("latest", manager.latest_step())
  manager.close()
"""


def test_full_disk_says_so_and_keeps_the_last_good_one(tmp_path):
  result = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(_FULL_DISK), str(tmp_path)],
    capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)},
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  assert result.stdout.splitlines() == [
    f"Checkpoint 2 could not be written to {tmp_path}/checkpoints (File too large); checkpoint 1 "
    "is complete. Make room or choose another workdir, then run the same command again to resume.",
    "latest 1",
  ]
  assert "Traceback" not in result.stderr
  assert len(_steps(tmp_path)) == 2  # step 1 and what the failed save left

  manager = manager_lib.Manager(tmp_path)
  assert _steps(tmp_path) == ["1"]
  x = {"x": jax.random.normal(jax.random.key(1), (1 << 18,))}
  restored, extra = manager.restore(_shard(x, _mesh(1, 1)))
  _assert_same(restored, x)
  assert extra == {"position": 1}
  manager.save(2, x, {})
  manager.close()
  assert _steps(tmp_path) == ["2"]


def test_leftovers_of_a_killed_save_are_removed_and_never_read(tmp_path):
  _saved(tmp_path, [1]).close()
  folder = tmp_path / "checkpoints"
  (folder / "1").rename(folder / "2.orbax-checkpoint-tmp")
  manager = manager_lib.Manager(tmp_path)
  assert manager.latest_step() is None
  assert _steps(tmp_path) == []
  manager.save(3, _state(3), {})
  manager.close()
  assert _steps(tmp_path) == ["3"]


def test_single_process_reaches_no_preemption_point(tmp_path):
  with _closing(tmp_path) as manager:
    assert manager.reached_preemption(1) is False
