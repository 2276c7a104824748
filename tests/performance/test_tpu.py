"""Compilation for TPUs that are not attached: program texts, slices, plans, a real compilation."""

import importlib
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mplug_jax.flops import hardware
from mplug_jax.performance.tpu import breakdown, hlo, plan, report, topology
from mplug_jax.performance.tpu import compile as compiler
from tests.support import paths, tiny_run


def _hlo(name):
  return (paths.FIXTURES / "hlo" / f"{name}.txt").read_text()


# Products of two batches of matrices as a TPU computes them: batch dimensions are spatial ones, in
# which every output meets one input.
CONVOLUTIONS = _hlo("convolutions")
# An iteration of a loop on a TPU: the slice of stacked weights and its conversion are a fusion
# inside that of the product; the second result is written into a stack. Layout S(1) is on-chip
# memory.
NESTED = _hlo("nested")
ASYNCHRONOUS = _hlo("asynchronous")


def test_of_a_stack_a_turn_reads_and_writes_a_slice():
  cost = hlo.cost(NESTED)
  assert cost.flops == 2 * 32 * 64 * 128
  assert (
    cost.traffic == 2 * 32 * 64 + 4 * 64 * 128 + 2 * 2 * 32 * 128
  )  # input, a layer's weights; the result, and its copy in the stack
  whole = NESTED.replace(
    "dynamic-slice(%p.0, %p.1, %zero.1, %zero.1), dynamic_slice_sizes={1,64,128}", "negate(%p.0)"
  )
  assert (
    hlo.cost(whole).traffic == cost.traffic + 23 * 4 * 64 * 128
  )  # what is not a slice is read whole
  own = NESTED.replace("ROOT %out.1 = (bf16[32,128]{1,0}", "ROOT %out.1 = (bf16[32,128]{1,0:S(1)}")
  assert hlo.cost(own).traffic == cost.traffic - 2 * 32 * 128


def test_breakdown_names_parts_directions_and_kinds(tmp_path):
  text = _hlo("paths")
  rows = breakdown.rows(text)
  one = 2 * 32 * 128  # bytes of the activation in bfloat16
  # A fusion belongs to its product, although it ends with the activation of another layer.
  assert {row[:5]: row[5:] for row in rows} == {
    ("visual_encoder", "feed-forward", "forward", "product", 1): (
      2 * 32 * 64 + 2 * 64 * 128 + one,
      2 * 32 * 64 * 128,
    ),
    ("fusion_encoder", "cross-attention", "backward", "kernel", 3): (3 * 2 * one, 3000),
    ("text_decoder", "attention", "recomputed", "move", 1): (2 * one, 0),
    ("other", "other", "unnamed", "collective", 1): (2 * one, 0),
    ("other", "other", "update", "elementwise", 1): (3 * one, 0),
  }
  cost = hlo.cost(text)
  assert sum(row.traffic for row in rows) == cost.traffic
  assert sum(row.flops for row in rows) == cost.flops
  table = breakdown.table(rows)
  assert any(line.split()[:2] == ["direction", "recomputed"] for line in table)
  breakdown.write_csv(tmp_path / "rows.csv", rows)
  lines = (tmp_path / "rows.csv").read_text().splitlines()
  assert lines[0] == "part,layer,direction,kind,count,traffic,flops"
  assert len(lines) == 6


def test_a_collective_beside_two_fusions_counts_once_and_a_gather_its_rows():
  cost = hlo.cost(_hlo("collective_fusions"))
  part, whole = 2 * 16 * 256, 2 * 64 * 256
  assert cost.collectives == {"all-gather": (1, whole, whole * 3 / 4)}
  value = 4 * 512 * 128  # each fusion reads and writes its own array, and hands the others on
  rows = 4 * 8 * 128
  assert cost.traffic == 2 * (2 * value) + (part + whole) + (rows + 4 * 8 + rows)


def test_a_loop_counts_as_often_as_it_runs_and_collectives_by_what_they_send():
  """The program has 5 iterations of a product whose inner dimension is split over 8 devices, and
  one more product.
  """
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("x",))

  @jax.jit
  def f(x, w):
    def turn(x, _):
      return jax.lax.with_sharding_constraint(
        jnp.tanh(x @ w), NamedSharding(mesh, P(None, "x"))
      ), ()

    x, _ = jax.lax.scan(turn, x, length=5)
    return x @ w

  x = jax.ShapeDtypeStruct((32, 256), jnp.float32, sharding=NamedSharding(mesh, P(None, "x")))
  w = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=NamedSharding(mesh, P("x", None)))
  cost = hlo.cost(f.lower(x, w).compile().as_text())
  assert cost.flops == 6 * 2 * 32 * 256 * 256 / 8
  # Whatever kind the partitioner chose, 32 x 256 numbers meet in each of the six products.
  assert sum(count for count, _, _ in cost.collectives.values()) >= 6
  assert sum(size for _, size, _ in cost.collectives.values()) >= 6 * 32 * 256 * 4
  assert all(0 < sent <= 2 * size for _, size, sent in cost.collectives.values())
  assert cost.traffic > 6 * 4 * 256 * 256 / 8  # the weights are read every time


def test_products_that_a_tpu_writes_as_convolutions():
  cost = hlo.cost(CONVOLUTIONS)
  assert cost.flops == 2 * 16 * 12 * 80 * 577 * 64
  assert cost.collectives == {}
  first, scores = 2 * 16 * 12 * 80 * 64, 4 * 16 * 12 * 80 * 577
  assert (
    cost.traffic == first + scores + 2 * scores
  )  # the second operand is in the chip's own memory
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.cost("HloModule m\n")


def test_what_is_fetched_ahead_is_read_once_and_a_kernel_says_what_it_computes():
  cost, part = hlo.cost(ASYNCHRONOUS), 2 * 192 * 768
  assert (
    cost.traffic == part + part + part
  )  # the slice is read, the copy written, and the kernel reads it
  away = ASYNCHRONOUS.replace(
    "bf16[192,768]{1,0:T(8,128)(2,1)S(1)}, s32", "bf16[192,768]{1,0:T(8,128)(2,1)}, s32"
  )
  assert hlo.cost(away).traffic == cost.traffic + part
  assert cost.flops == 12345


def test_pairs_of_outputs_and_kernel_positions_are_those_counted_one_by_one():
  rng = np.random.default_rng(0)
  for _ in range(300):
    inputs, kernel, outputs = (int(n) for n in rng.integers(1, 9, 3))
    stride, dilation, spread, low = (int(n) for n in rng.integers((1, 1, 1, -3), (5, 7, 3, 9)))
    positions = [o * stride + k * spread - low for k in range(kernel) for o in range(outputs)]
    expected = sum(p >= 0 and p % dilation == 0 and p // dilation < inputs for p in positions)
    window = {
      "stride": f"{stride}",
      "lhs_dilate": f"{dilation}",
      "rhs_dilate": f"{spread}",
      "pad": f"{low}_0",
    }
    assert hlo._pairs(inputs, kernel, outputs, window, 0) == expected
  # A batch as a dimension of the window: every output meets one kernel position.
  assert hlo._pairs(16384, 16384, 16384, {"stride": "16383", "lhs_dilate": "16384"}, 0) == 16384


def test_what_the_compiler_says_of_too_much_memory():
  error = compiler._too_large(
    "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 45.59G of "
    "15.75G hbm. Exceeded"
  )
  assert (error.needed, error.limit) == (45.59 * 2**30, 15.75 * 2**30)
  error = compiler._too_large(
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(1.65T) exceeds "
    "available HBM (15.75G)."
  )
  assert (error.needed, error.limit) == (1.65 * 2**40, 15.75 * 2**30)
  assert compiler._too_large("something else") is None


@pytest.mark.parametrize(
  ("text", "kind", "expected"),
  [
    (
      "%r = f32[64]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add",
      "all-reduce",
      (1, 256, 2 * 256 * 3 / 4),
    ),
    (
      "%r = f32[64]{0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}",
      "all-gather",
      (1, 256, 256 * 3 / 4),
    ),
    (
      "%r = (f32[64]{0}, f32[256]{0}) all-gather-start(%p), replica_groups=[1,4]<=[4], "
      "dimensions={0}",
      "all-gather",
      (1, 1024, 768),
    ),
    (
      "%r = f32[64]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}",
      "collective-permute",
      (1, 256, 256),
    ),
  ],
)
def test_bytes_that_a_device_sends(text, kind, expected):
  module = (
    f"ENTRY %main (p: f32[64]) -> f32[64] {{\n  %p = f32[64]{{0}} parameter(0)\n  ROOT {text}\n}}\n"
  )
  assert hlo.cost(module).collectives == {kind: expected}


def test_names_of_slices_and_chips():
  for name, message in (
    ("v5e", "is not CHIP:SHAPE, such as v5e:1x1"),
    ("v9:2x2", "'v9' is unknown; there are v4, v5e"),
    ("v5e:4", "is not CHIP:SHAPE"),
  ):
    with pytest.raises(ValueError, match=message):
      topology.slice_of(name)
  assert [hardware.chip(name).memory / 2**30 for name in ("v4", "v5e", "v5p", "v6e", "tpu7x")] == [
    32,
    16,
    95,
    32,
    192,
  ]
  assert hardware.chip("v5e").flops == 197e12 == hardware.peak_flops("TPU v5 lite")
  assert hardware.peak_flops("cpu") is None
  assert all(
    chip.source and chip.links < chip.bandwidth < chip.flops for chip in hardware.CHIPS.values()
  )


def place(count=8):
  return topology.Slice("v5e:2x4", jax.devices()[:count], count, hardware.chip("v5e"))


def config(name="pretrain", **changes):
  c = importlib.import_module(f"configs.{name}").get_config("tiny").unlock()
  c.update_from_flattened_dict({"model.image_size": 32, "data.size": 48, "batch_size": 8} | changes)
  return c.lock()


def fake_report(seconds=1.0):
  return compiler.Report(
    1e9,
    2e9,
    3e9,
    4e12,
    3e12,
    5e9,
    {"all-reduce": (2.0, 1e6, 2e6)},
    {"compute": seconds, "memory": 0.5},
    9.0,
    _hlo("paths"),
  )


def test_a_program_that_does_not_fit_gets_a_change_that_does(monkeypatch):
  """With a fake compiler: 16 GiB are needed until all is recomputed and parameters are split."""
  asked = []

  def compile_for(c, place, name, effort):
    asked.append((c.model.remat, c.mesh.fsdp, c.optim.microbatches))
    if asked[-1][:2] != ("full", 8):
      raise compiler.DoesNotFit(16 * 2**30, 15.75 * 2**30)
    return fake_report()

  monkeypatch.setattr(compiler, "compile_for", compile_for)
  monkeypatch.setattr(topology, "slice_of", lambda name: place())
  said = []
  status = report.run(
    config("vqa"), "v5e:2x4", "train", "low", False, 6, lambda lines, row: said.append((lines, row))
  )
  assert status == 3
  assert asked == [("none", 1, 1), ("dots", 1, 1), ("full", 1, 1), ("full", 8, 1)]
  assert "needs 16.00 GiB of HBM where 15.75 GiB can be used: 0.25 GiB too much" in said[0][0][0]
  assert said[0][1]["fits"] is False
  assert (
    said[1][0][0]
    == "this fits: --config.model.remat=full --config.mesh.data=-1 --config.mesh.fsdp=8"
  )
  assert said[1][0][-1].endswith("compute bounds it, MFU at most 2%")
  assert said[1][1]["peak_gib"] == 3e9 / 2**30
  slow = fake_report(seconds=0.1)  # by memory: another program may move less
  assert (
    "--effort=full compiles one" in report.lines(slow, config("vqa"), place(), "train", "low")[-1]
  )
  assert report.lines(slow, config("vqa"), place(), "train", "full")[-1].endswith(
    "memory bounds it, MFU at most 3%"
  )
  asked.clear()
  report.run(
    config("vqa"), "v5e:2x4", "train", "low", False, 1, lambda lines, row: said.append((lines, row))
  )
  assert len(asked) == 2
  assert said[-1][0][0].startswith("nothing tried fits (of --max_compiles=1)")


def test_a_program_and_its_breakdown_are_kept(monkeypatch, tmp_path):
  monkeypatch.setattr(compiler, "compile_for", lambda *args: fake_report())
  monkeypatch.setattr(topology, "slice_of", lambda name: place())
  said = []

  def run():
    return report.run(
      config("vqa"),
      "v5e:2x4",
      "train",
      "low",
      False,
      6,
      lambda lines, row: said.extend(lines),
      detailed=True,
      dump=str(tmp_path / "kept"),
    )

  assert run() == 0
  assert any(line.split()[:3] == ["fusion_encoder", "cross-attention", "backward"] for line in said)
  assert (tmp_path / "kept" / "program.txt").read_text() == _hlo("paths")
  assert (tmp_path / "kept" / "breakdown.csv").read_text().startswith("part,layer,")
  with pytest.raises(FileExistsError, match="is not empty; choose another folder"):
    run()


def test_a_plan_tries_the_most_promising_and_stops_when_nothing_can_be_better(monkeypatch):
  c = config("vqa", batch_size=64)
  expected = plan.candidates(c, place())
  assert expected == sorted(expected, key=lambda candidate: candidate.seconds)
  assert all(candidate.memory < place().chip.memory for candidate in expected)
  assert {
    candidate.flags["mesh.data"] * candidate.flags["mesh.fsdp"] * candidate.flags["mesh.tensor"]
    for candidate in expected
  } == {8}
  monkeypatch.setattr(plan, "candidates", lambda *args: expected)
  tried = plan.search(c, place(), "low", 3, lambda flags: fake_report(seconds=1e9))
  assert [candidate for candidate, _ in tried] == expected[:3]
  tried = plan.search(
    c, place(), "low", 9, lambda flags: fake_report(seconds=0.0)._replace(seconds={"compute": 0.0})
  )
  assert len(tried) == 1

  def refused(flags):
    raise compiler.DoesNotFit(17e9, 16e9)

  assert [type(result) for _, result in plan.search(c, place(), "low", 2, refused)] == [
    compiler.DoesNotFit
  ] * 2


LOWERED = [
  ("retrieval", "rerank"),
  ("retrieval", "embed"),
  ("nlvr2", "generate"),
  ("vqa", "generate"),
  ("caption", "generate"),
  ("grounding", "generate"),
  ("pretrain", "train"),
  ("vqa", "train"),
  ("caption", "train"),
  ("caption_scst", "train"),
  ("retrieval", "train"),
  ("grounding", "train"),
  ("nlvr2", "train"),
  ("snli_ve", "train"),
]


@pytest.mark.parametrize(("name", "function"), LOWERED)
def test_programs_are_lowered_for_accelerators_with_kernels_of_attention(name, function):
  """Without a TPU, a GPU or their compilers; predict functions are sharded over 8 devices."""
  one = ("vision_layers", "text_layers", "decoder_layers", "fusion_layers")
  changes = {f"model.{field}": 1 for field in one}
  changes |= {"model.dtype": "bfloat16", "model.image_size": 64, "eval.batch_size": 8}
  if function != "train":
    changes |= {"mesh.data": 4, "mesh.fsdp": 2}
  c = config(name, **changes)
  built = compiler.build_for(c, jax.devices()[: 1 if function == "train" else 8])
  traced = compiler.trace(built, c, function)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  kernels = {kernel for kernel in ("forward", "keys", "query") if f"attention_{kernel}_" in text}
  assert kernels == ({"forward", "keys", "query"} if function == "train" else {"forward"})
  assert text.count("__gpu$xla.gpu.triton") >= len(kernels)
  if function != "train" or name == "vqa":
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= (2 if function == "train" else 1)
  with pytest.raises(
    ValueError, match="--fn=nothing: the task has no such function; it has train, "
  ):
    compiler.function_of(built.task, "nothing")


def test_the_command_says_what_is_wrong():
  run = subprocess.run(
    [
      sys.executable,
      "-m",
      "tools.compile_tpu",
      f"--config={tiny_run.ROOT}/configs/vqa.py:tiny",
      "--topology=v5x:2x2",
    ],
    capture_output=True,
    text=True,
    cwd=tiny_run.ROOT,
  )
  assert run.returncode == 1
  assert (
    run.stderr.splitlines()[-1]
    == "error: The chip 'v5x' is unknown; there are v4, v5e, v5p, v6e, tpu7x."
  )


def compile_tpu(tmp_path, *arguments):
  """-> (exit status, what it printed, rows of --json)."""
  rows = tmp_path / "rows.jsonl"
  command = [
    sys.executable,
    "-m",
    "tools.compile_tpu",
    f"--config={tiny_run.ROOT}/configs/vqa.py:tiny",
    f"--json={rows}",
    *arguments,
  ]
  run = subprocess.run(
    command,
    capture_output=True,
    text=True,
    cwd=tiny_run.ROOT,
    env=os.environ | topology.ENVIRONMENT,
  )
  assert run.returncode in (0, 3), run.stderr
  return run.returncode, run.stdout, [json.loads(line) for line in rows.read_text().splitlines()]


@pytest.mark.slow
def test_a_real_compilation(tmp_path):
  pytest.importorskip("libtpu")
  status, _, (row,) = compile_tpu(tmp_path, "--topology=v5e:2x2")
  assert status == 0
  assert row["fits"]
  assert 0.9 < row["tflop"] / row["model_tflop"] < 2
  assert row["collectives"]


@pytest.mark.slow
def test_a_real_program_that_does_not_fit_gets_a_change_that_does(tmp_path):
  pytest.importorskip("libtpu")
  status, said, (row, fixed) = compile_tpu(tmp_path, "--topology=v5e:1x1", "--batch=16384")
  assert status == 3
  assert not row["fits"]
  assert row["needed_gib"] > row["limit_gib"] == 15.75
  assert fixed["fits"]
  assert fixed["peak_gib"] < 15.75
  assert "this fits: --config.model.remat=full --config.optim.microbatches=2" in said


@pytest.mark.slow
def test_a_real_plan(tmp_path):
  pytest.importorskip("libtpu")
  status, said, rows = compile_tpu(
    tmp_path, "--topology=v5e:2x2", "--batch=4096", "--plan", "--max_compiles=2"
  )
  assert status == 0
  assert rows
  assert all("mesh.data" in row["flags"] for row in rows)
  assert "fastest that fits: --config.mesh.data=" in said
