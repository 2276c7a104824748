"""The efficiency study of fusion networks on the tiny model: its rows, files, and operation counts against the traced networks."""

import csv

import jax
import jax.numpy as jnp
import pytest

from mplug_jax.config.presets import PRESETS
from mplug_jax.flops import layers
from mplug_jax.flops import traced as task_flops
from mplug_jax.models.mplug import MPlug
from mplug_jax.performance import fusion_benchmark


@pytest.fixture(scope="module")
def model():
  return MPlug(**PRESETS["tiny"] | {"vocab_size": 320, "pad_id": 0})


def test_operations_are_those_of_the_traced_networks(model):
  text, image, mask = (
    jnp.ones((1, 7, 32)),
    jnp.ones((1, layers.image_tokens(model), 32)),
    jnp.ones((1, 7), bool),
  )
  counted = {}
  for name, (network, operations) in fusion_benchmark.networks(model).items():
    params = jax.eval_shape(network.init, jax.random.key(0), text, mask, image)
    traced = jax.make_jaxpr(network.apply)(params, text, mask, image).jaxpr
    counted[name] = task_flops._count(traced, [False] * len(traced.invars), 1)[0]
    assert operations(7) == counted[name], name
  assert list(counted) == [
    "co-attention",
    "connected",
    *(f"skip-connected, stride {s}" for s in (1, 2)),
    "asymmetric",
  ]
  assert counted["asymmetric"] == counted["skip-connected, stride 2"]


def test_table_and_files(model, tmp_path, capsys):
  rows = fusion_benchmark.measure(model, batch=1, length=7, repeats=1)
  assert [row["network"] for row in rows] == list(fusion_benchmark.networks(model))
  assert all(row["seconds"] > 0 and row["mbytes"] > 0 and row["peak_mbytes"] > 0 for row in rows)
  assert rows[-1]["gflop_ratio"] == rows[-1]["seconds_ratio"] == rows[-1]["paper_ratio"] == 1
  assert rows[0]["paper_ratio"] == pytest.approx(1.86 / 0.28)
  lines = fusion_benchmark.table(rows)
  assert len(lines) == 1 + len(rows)
  assert lines[1].startswith("co-attention")
  data, picture = fusion_benchmark.write(rows, tmp_path / "fusion")
  with open(data) as file:
    read = list(csv.DictReader(file))
  assert [row["network"] for row in read] == [row["network"] for row in rows]
  assert float(read[0]["seconds"]) == rows[0]["seconds"]
  with open(picture, "rb") as file:
    assert file.read(4) == b"\x89PNG"


def test_numbers_of_operations_at_the_size_of_the_paper():
  """At 577 image tokens and 30 of text the closed forms by hand, in GFLOP."""
  base = MPlug(**PRESETS["base"], pad_id=0)
  counted = {
    name: operations(30) / 1e9 for name, (_, operations) in fusion_benchmark.networks(base).items()
  }
  width, tokens = 768, 607
  connected = 6 * (24 * tokens * width**2 + 4 * tokens**2 * width) / 1e9
  assert counted["connected"] == pytest.approx(connected)
  falling = [
    counted["connected"],
    *(counted[f"skip-connected, stride {stride}"] for stride in (1, 2, 3)),
  ]
  assert falling == sorted(set(falling), reverse=True)
  assert counted["co-attention"] / counted["skip-connected, stride 3"] == pytest.approx(
    3.92, abs=0.01
  )
