"""The efficiency study of fusion networks on the tiny model: rows, files and operation counts."""

import csv

import pytest

from mplug_jax.config.presets import PRESETS
from mplug_jax.models.mplug import MPlug
from mplug_jax.performance import fusion_benchmark
from tests.support import flop_formulas


@pytest.fixture(scope="module")
def model():
  return MPlug(**PRESETS["tiny"] | {"vocab_size": 320, "pad_id": 0})


def _formulas(model):
  """{name: operations of a pair with a text of `length` tokens: length -> int}."""
  depth = model.fusion_layers

  def fusion_encoder(stride, rule="released"):
    geometry = model.clone(stride=stride, fusion=rule)
    return lambda length: flop_formulas.fusion_encoder(geometry, 1, 1, length)

  return {
    "co-attention": lambda length: depth * flop_formulas.co_attention_layer(model, 1, length),
    "connected": fusion_encoder(0, "paper"),
    **{f"skip-connected, stride {s}": fusion_encoder(s) for s in range(1, depth + 1)},
    "asymmetric": fusion_encoder(depth, "paper"),
  }


def test_operations_of_the_traced_networks_are_those_of_the_formulas(model):
  formulas = _formulas(model)
  counted = {}
  for name, network in fusion_benchmark.networks(model).items():
    counted[name] = fusion_benchmark.operations(model, network, 7)
    assert counted[name] == formulas[name](7), name
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
  counted = {name: operations(30) / 1e9 for name, operations in _formulas(base).items()}
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
