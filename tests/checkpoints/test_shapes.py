"""Shapes of saved arrays: read once for each save, and again when the folder is written again."""

import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from mplug_jax.checkpoints import reading, shapes


def _save(folder, rows, **options):
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
    checkpointer.save(folder, {"params": {"kernel": np.ones((rows, 2), np.float32)}})


@pytest.mark.parametrize("use_ocdbt", [True, False])
def test_a_folder_that_is_written_again_is_read_again(tmp_path, use_ocdbt):
  folder = epath.Path(tmp_path / "state")
  for rows in (3, 4):
    _save(folder, rows, use_ocdbt=use_ocdbt)
    assert shapes.saved_shapes(folder) == {"params/kernel": (rows, 2)}
    assert reading.load_arrays(folder, "params")["kernel"].shape == (rows, 2)
    shutil.rmtree(folder)


def test_one_save_is_read_once(tmp_path, monkeypatch):
  folder = epath.Path(tmp_path / "state")
  _save(folder, 3)
  first = shapes.saved_tree(folder)
  monkeypatch.setattr(ocp, "PyTreeCheckpointHandler", None)
  assert shapes.saved_tree(folder) is first
