"""Position tables at another resolution, against tables that PyTorch resized."""

import numpy as np
import pytest

from mplug_jax.checkpoints.position_embeddings import resize_positions
from tests.support import paths

with np.load(paths.GOLDEN / "resize_pos_embed.npz") as file:
  ARRAYS = {name: file[name] for name in file.files}
CASES = [name.removeprefix("in/") for name in ARRAYS if name.startswith("in/")]


@pytest.mark.parametrize("case", CASES)
def test_bit_for_bit(case):
  expected = ARRAYS[f"out/vit/{case}"]
  np.testing.assert_array_equal(resize_positions(ARRAYS[f"in/{case}"], len(expected)), expected)


def test_the_class_token_stays_and_a_constant_grid_too():
  table = np.full((1 + 16, 3), 0.3, np.float32)
  table[0] = 7
  out = resize_positions(table, 1 + 49)
  assert (out[0] == 7).all()
  np.testing.assert_allclose(out[1:], 0.3, rtol=1e-6)


def test_no_square():
  with pytest.raises(ValueError, match="17 rows cannot become one of 12"):
    resize_positions(np.zeros((17, 2), np.float32), 12)
