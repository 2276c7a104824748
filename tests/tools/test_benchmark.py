"""tools/benchmark.py: tiny runs end to end, and the arithmetic of its comparison."""

import json
import sys
import time
from types import SimpleNamespace

import jax
import pytest

from mplug_jax.models.factory import build_model
from tests.support import flop_formulas
from tools import benchmark, benchmark_report


@pytest.fixture
def quick(monkeypatch):
  """Parts run in this process, and compile at the lowest optimization."""
  monkeypatch.setattr(benchmark, "_in_process", lambda function, options: function(options))
  monkeypatch.setattr(benchmark, "matmul", lambda options: {"gflop_per_second": 195.0, "rates": {}})
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def model(config):
  return build_model(config, SimpleNamespace(vocab_size=320, pad_id=0))


@pytest.mark.slow
def test_train_step(quick, tmp_path, capsys):
  benchmark.main(["vqa_step", "--preset=tiny", "--repeats=2", f"--json={tmp_path}/out.json"])
  results = json.loads((tmp_path / "out.json").read_text())
  step = results["vqa_step"]
  tiny = model(benchmark._config(SimpleNamespace(preset="tiny", image_size=0)))
  assert step["gflop"] == pytest.approx(flop_formulas.vqa_train_step(tiny, 2, 1, 32, 1, 6) / 1e9)
  assert step["gflop_per_second"] == pytest.approx(step["gflop"] / step["seconds"])
  assert 0 < step["min_seconds"] <= step["seconds"] < step["compile_seconds"]
  assert 0.1 < step["peak_gib"] < 16
  assert results["compared"] == {}  # the reference figures are of base
  assert "train step, batch 2" in capsys.readouterr().out


def test_captions_run_every_step(quick, tmp_path, capsys):
  benchmark.main(
    [
      "caption",
      "--preset=tiny",
      "--repeats=1",
      "--caption_batches",
      "2",
      f"--json={tmp_path}/out.json",
    ]
  )
  measured = json.loads((tmp_path / "out.json").read_text())["caption"]["batches"]
  assert list(measured) == ["2"]
  assert measured["2"]["images_per_second"] == pytest.approx(1 / measured["2"]["seconds_per_image"])
  assert "caption, batch 2" in capsys.readouterr().out


def test_plain_product_has_a_plausible_rate():
  assert 1 < benchmark.matmul(None)["gflop_per_second"] < 1e6


def base_results(rate, step, peak, captions):
  batches = {
    size: {
      "seconds_per_image": x,
      "images_per_second": 1 / x,
      "gflop_per_second": 1.0,
      "compile_seconds": 1.0,
    }
    for size, x in captions.items()
  }
  return {
    "preset": "base",
    "image_size": 384,
    "load_average": 0.0,
    "matmul": {"gflop_per_second": rate},
    "vqa_step": {
      "batch": 2,
      "seconds": step,
      "min_seconds": step,
      "user_seconds": 1.0,
      "system_seconds": 1.0,
      "gflop": 900.0,
      "gflop_per_second": 900 / step,
      "init_seconds": 1.0,
      "compile_seconds": 1.0,
      "peak_gib": peak,
    },
    "caption": {"batches": batches},
    "startup": {"cold": 44.0, "warm": 21.0},
  }


def test_pytorch_seconds_are_scaled_to_this_machine():
  # Twice as fast as the machine of the reference figures: PyTorch would need half its seconds.
  results = base_results(390.0, step=4.0, peak=8.0, captions={"1": 1.5, "4": 2.2, "8": 1.2})
  compared = benchmark_report.compare(results)
  assert compared["train step"]["pytorch"] == pytest.approx(5.8)
  assert compared["train step"]["ratio"] == pytest.approx(4.0 / 5.8)
  assert compared["caption, batch 8"]["ratio"] == pytest.approx(1.2 / 8.8)
  verdicts = {
    line.split("  ")[0]: line.split()[-1]
    for line in benchmark_report.report(results)
    if line.endswith(("met", "missed"))
  }
  assert verdicts == {
    "train step": "met",
    "caption, batch 1": "met",
    "caption, batch 8": "missed",
    "peak memory": "missed",
    "start-up, cold": "met",
    "start-up, warm": "missed",
  }


def test_startup_ends_the_command_at_the_sign():
  start = time.perf_counter()
  program = "import time; print('one'); print('the sign', flush=True); time.sleep(60)"
  assert (
    0
    < benchmark._seconds_until([sys.executable, "-c", program], "sign")
    < time.perf_counter() - start
    < 50
  )
  with pytest.raises(RuntimeError, match="before its first step: .*no such data"):
    benchmark._seconds_until([sys.executable, "-c", "raise SystemExit('no such data')"], "sign")
