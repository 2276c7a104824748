"""Runs start from converted checkpoints and become official models."""

import json
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
import pytest

from mplug_jax.checkpoints import manager as manager_lib
from mplug_jax.checkpoints import warm_start
from mplug_jax.conversion import exporter, importer, mapping, official_inventory
from tests.support.official_state import (
  GIVEN,
  TEXT_TOWER,
  assert_same_bytes,
  geometry,
  read,
  save,
  state_dict,
)


@pytest.fixture(autouse=True)
def _narrow_text_tower(monkeypatch):
  """CLIP's text tower, which exports draw, with its layers but not its 63 million parameters."""
  monkeypatch.setattr(official_inventory, "clip_text", lambda width: TEXT_TOWER._replace(layers=12))


class State(NamedTuple):
  """The fields of a TrainState that `init_from` reads and replaces."""

  params: dict
  ema_params: dict

  def replace(self, **values):
    return self._replace(**values)


@pytest.mark.parametrize("converted", ["ours", "ours.safetensors"])
def test_a_run_starts_from_either_form(converted, tmp_path):
  tensors = state_dict("vqa")
  position = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  importer.convert_checkpoint(
    save(tmp_path / "official.pth", tensors), tmp_path / converted, **GIVEN
  )
  expected = [
    mapping.params_from_torch(tensors, geometry(), momentum, dtype=np.float32)
    for momentum in (False, True)
  ]
  zeros = jax.tree.map(lambda x: jax.device_put(np.zeros_like(x), position), expected[0])
  options = ml_collections.ConfigDict(
    {"paths": (str(tmp_path / converted),), "new": (), "unused": (), "copies": ()}
  )
  state, report = warm_start.init_from(State(zeros, zeros), options)
  jax.tree.map(np.testing.assert_array_equal, [state.params, state.ema_params], expected)
  assert set(report.values()) == {str(tmp_path / converted)}


def test_a_run_goes_to_torch_and_back(tmp_path):
  """A run folder becomes the official VQA model, and its parameters come back."""
  g = geometry()
  tensors = state_dict("vqa")
  params = mapping.params_from_torch(tensors, g, dtype=np.float32)
  manager = manager_lib.Manager(tmp_path / "run")
  manager.save(1, {"params": params, "ema_params": ()}, {"step": 1})
  manager.close()
  model = g | {"vocab_size": 0, "fusion": "released", "vision_heads": 0}
  (tmp_path / "run" / "config.json").write_text(
    json.dumps({"task": {"name": "vqa"}, "model": model})
  )
  manifest = exporter.export_torch(tmp_path / "run", tmp_path / "run.pth")
  assert {
    row["why"] for row in manifest["tensors"] if row["name"].startswith("text_encoder_m.encoder")
  } == {"copied from the online weights: the checkpoint has no average"}
  exported = read(tmp_path / "run.pth")
  assert exported.keys() == official_inventory.inventory("vqa", g).keys()
  jax.tree.map(np.testing.assert_array_equal, mapping.params_from_torch(exported, g), params)


@pytest.mark.parametrize(("run_task", "task"), [("retrieval", "retrieval"), ("scst", "caption")])
def test_runs_keep_their_queues_and_know_their_official_model(run_task, task, tmp_path):
  g = geometry()
  tensors = state_dict(task)
  queues = {
    name: tensors[name]
    for name in ("image_queue", "text_queue", "idx_queue", "queue_ptr")
    if name in tensors
  }
  converted = {name: x.astype(np.int32) if x.dtype == np.int64 else x for name, x in queues.items()}
  manager = manager_lib.Manager(tmp_path / "run")
  manager.save(
    1,
    {
      "params": mapping.params_from_torch(tensors, g, dtype=np.float32),
      "ema_params": (),
      "extra": converted or (),
    },
    {},
  )
  manager.close()
  model = g | {"vocab_size": 0, "fusion": "released", "vision_heads": 0}
  (tmp_path / "run" / "config.json").write_text(
    json.dumps({"task": {"name": run_task}, "model": model})
  )
  assert exporter.export_torch(tmp_path / "run", tmp_path / "run.pth")["task"] == task
  exported = read(tmp_path / "run.pth")
  assert exported.keys() == official_inventory.inventory(task, g).keys()
  assert_same_bytes({name: exported[name] for name in queues}, queues)
