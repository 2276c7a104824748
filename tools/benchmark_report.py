"""Text report of tools/benchmark.py, with the official PyTorch code for comparison."""

from collections.abc import Iterator, Mapping
from typing import Any

from mplug_jax.performance import fusion_benchmark, ops_benchmark, train_step_benchmark

# The official PyTorch code: base, 384 px, float32, 2 threads of an idle machine where a plain
# float32 matrix product reached 240 GFLOP/s in PyTorch and 195 in XLA. {name: (seconds, limit)};
# limit: our seconds over PyTorch's, scaled by 195 / XLA's rate on this machine.
REFERENCE_MATMUL = 195.0
REFERENCE = {
  # 2 images with one question of 32 tokens and one answer each, dropout on.
  "train step": (11.6, 0.7),
  # Seconds per image: 5 beams, 25 tokens, image encoder included.
  "caption, batch 1": (15.7, 1 / 5),
  "caption, batch 4": (17.6, None),
  "caption, batch 8": (17.6, 1 / 8),  # PyTorch's seconds are those of batch 4
}
REFERENCE_MEMORY = 7.4  # GiB, peak resident set of the train step; also the limit
# Seconds from the command to the end of the first step of base.
STARTUP_LIMITS = {"cold": 45.0, "warm": 20.0}


def compare(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Compares measured seconds with REFERENCE.

  Args:
    results: {part of tools/benchmark.py: its result}.

  Returns:
    {name in REFERENCE: {"seconds", "pytorch" (scaled), "ratio", "limit"}}; empty unless the results
    are of base at 384 px.
  """
  if (results["preset"], results["image_size"]) != ("base", 384):
    return {}
  scale = REFERENCE_MATMUL / results["matmul"]["gflop_per_second"]
  seconds = {
    f"caption, batch {size}": x["seconds_per_image"]
    for size, x in results.get("caption", {"batches": {}})["batches"].items()
  }
  if "vqa_step" in results:
    seconds["train step"] = results["vqa_step"]["seconds"]
  return {
    name: {
      "seconds": seconds[name],
      "pytorch": reference * scale,
      "ratio": seconds[name] / (reference * scale),
      "limit": limit,
    }
    for name, (reference, limit) in REFERENCE.items()
    if name in seconds
  }


def _train_step_lines(x: Mapping[str, float], rate: float) -> list[str]:
  """Returns lines about the train step; rate: GFLOP/s of the plain matrix product."""
  return [
    f"train step, batch {x['batch']}: {x['seconds']:.2f} s (least {x['min_seconds']:.2f}), "
    f"{x['gflop']:.0f} GFLOP of products at {x['gflop_per_second']:.0f} GFLOP/s = "
    f"{x['gflop_per_second'] / rate:.0%} of the plain product",
    f"  CPU time: {x['user_seconds']:.1f} s in the program, {x['system_seconds']:.1f} s in the "
    "system",
    f"  peak memory {x['peak_gib']:.2f} GiB; initialized in {x['init_seconds']:.1f} s, compiled in "
    f"{x['compile_seconds']:.1f} s",
  ]


def _caption_line(size: str, x: Mapping[str, float], rate: float) -> str:
  """Returns the line about captioning; size: rows of the batch."""
  return (
    f"caption, batch {size}: {x['seconds_per_image']:.2f} s per image, "
    f"{x['images_per_second']:.2f} images/s, {x['gflop_per_second']:.0f} GFLOP/s = "
    f"{x['gflop_per_second'] / rate:.0%}, compiled in {x['compile_seconds']:.1f} s"
  )


def _comparison_lines(results: Mapping[str, Any]) -> Iterator[str]:
  """Yields the table of `compare`, memory and start-up."""
  rows = [
    (name, "s", x["seconds"], x["pytorch"], x["limit"]) for name, x in compare(results).items()
  ]
  if rows and "vqa_step" in results:
    rows.append(("peak memory", "GiB", results["vqa_step"]["peak_gib"], REFERENCE_MEMORY, 1.0))
  if rows:
    yield f"{'':18}{'ours':>12}{'PyTorch, scaled':>18}{'ratio':>8}{'limit':>8}"
  for name, unit, value, pytorch, limit in rows:
    verdict = (
      "" if limit is None else f"{limit:8.3f}  {'met' if value <= limit * pytorch else 'missed'}"
    )
    yield f"{name:18}{value:8.2f} {unit:3}{pytorch:14.2f} {unit:3}{value / pytorch:8.3f}{verdict}"
  if rows and "startup" in results:
    for name, seconds in results["startup"].items():
      limit = STARTUP_LIMITS[name]
      verdict = "met" if seconds <= limit else "missed"
      yield f"{'start-up, ' + name:18}{seconds:8.2f} s{'':28}{limit:6.0f} s  {verdict}"


def report(results: Mapping[str, Any]) -> list[str]:
  """Returns the report as lines of text.

  Args:
    results: {part of tools/benchmark.py: its result}.
  """
  rate = results["matmul"]["gflop_per_second"]
  lines = [
    f"plain float32 product: {rate:.0f} GFLOP/s; "
    f"load average at the start {results['load_average']:.1f}"
  ]
  if "vqa_step" in results:
    lines += _train_step_lines(results["vqa_step"], rate)
  if "caption" in results:
    lines += [_caption_line(size, x, rate) for size, x in results["caption"]["batches"].items()]
  if "startup" in results:
    lines += [
      f"command to first step, {name} compilation cache: {x:.1f} s"
      for name, x in results["startup"].items()
    ]
  if "data" in results:
    x = results["data"]
    lines.append(
      f"easy-VQA pipeline: {x['rows_per_second']:.0f} rows/s "
      f"of {x['questions_per_row']} questions, {x['image_size']} px"
    )
  for name, x in results.get("loader", {}).items():
    lines.append(
      f"JPEG pipeline, {name}: {x['examples_per_second']:.0f} examples/s, "
      f"PyTorch and torchvision {x['pytorch_examples_per_second']:.0f}: {x['ratio']:.2f} x"
    )
  tables = {
    "fusion": fusion_benchmark.table,
    "steps": train_step_benchmark.steps_table,
    "rerank": train_step_benchmark.rerank_table,
    "ops": ops_benchmark.report,
  }
  for name, lines_of in tables.items():
    if name in results:
      lines += lines_of(results[name])
  return lines + list(_comparison_lines(results))
