"""The comparison of array operations with their references."""

from mplug_jax.performance import ops_benchmark


def test_every_operation_is_measured_beside_its_reference(monkeypatch):
  for name, value in (("_TOKENS", 4), ("_WIDTH", 8), ("_HEADS", 2)):
    monkeypatch.setattr(ops_benchmark, name, value)
  rows = ops_benchmark.measure(batch=1, repeats=1)
  assert len({row["name"] for row in rows}) == len(rows) == 7
  for row in rows:
    assert row["milliseconds"] >= 0
    assert row["reference_megabytes"] >= 0
  assert len(ops_benchmark.report(rows)) == 8
