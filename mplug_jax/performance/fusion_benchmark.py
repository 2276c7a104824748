"""Cost of the ways to fuse image and text, as in the paper's efficiency study.

mPLUG, Li et al. 2022, section 3.2, figures 1, 3 and 4: the forward pass of the fusion network on
tokens of the encoders. Networks are co-attention (two streams, each with self-attention and
cross-attention to the other), connected attention (every layer over image and text together),
asymmetric co-attention (text reads the image, which no layer changes) and skip-connected fusion at
every stride. All have the same number of layers.
"""

import csv
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mplug_jax.flops import traced
from mplug_jax.models.bert import BertConfig, BertLayer, Memory
from mplug_jax.models.fusion import FusionEncoder
from mplug_jax.models.mplug import MPlug
from mplug_jax.performance.geometry import image_tokens

# Seconds for the forward pass of 100 samples in the paper, which does not name the hardware:
# figures 1 and 4 for the first two, figure 3 (ViT-B) for the rest, read from the figures.
PAPER = {
  "co-attention": 1.86,
  "connected": 1.65,
  "skip-connected, stride 1": 1.65,
  "skip-connected, stride 2": 1.03,
  "skip-connected, stride 3": 0.41,
  "skip-connected, stride 6": 0.28,
  "asymmetric": 0.28,
}
COLUMNS: tuple[str, ...] = (
  "network",
  "gflop",
  "mbytes",
  "peak_mbytes",
  "seconds",
  "gflop_ratio",
  "seconds_ratio",
  "paper_seconds",
  "paper_ratio",
)


class CoAttention(nn.Module, kw_only=True):
  """Two streams of layers, each with cross-attention to the other stream.

  Attributes:
    config: config of the layers.
    depth: number of layers of each stream.
  """

  config: BertConfig
  depth: int

  @nn.compact
  def __call__(
    self,
    text: Float[Array, "batch length width"],
    mask: Bool[Array, "batch length"],
    image: Float[Array, "batch tokens width"],
  ) -> tuple[Float[Array, "batch tokens width"], Float[Array, "batch length width"]]:
    """Fuses image and text.

    Args:
      text: f[B, L, D].
      mask: bool[B, L], True for tokens.
      image: f[B, N, D].

    Returns:
      The image f[B, N, D] and the text f[B, L, D].
    """
    for j in range(self.depth):
      memory = Memory((text,), (mask,))
      from_text, _ = BertLayer(config=self.config, cross=True, name=f"image_{j}")(
        image, None, memory, memory.mask
      )
      text, _ = BertLayer(config=self.config, cross=True, name=f"text_{j}")(
        text, mask, Memory((image,), (None,))
      )
      image = from_text
    return image, text


def networks(model: MPlug) -> dict[str, nn.Module]:
  """Returns {name: fusion network}, the most expensive first.

  Args:
    model: model with the geometry of the layers.
  """
  bert = BertConfig(
    vocab_size=model.vocab_size,
    hidden_size=model.hidden_size,
    heads=model.heads,
    mlp_dim=model.mlp_dim,
    max_positions=model.max_positions,
    pad_id=model.pad_id,
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
    initializer_range=model.initializer_range,
    dtype=model.dtype,
    remat="none",
    attention_impl=model.attention_impl,
    ops=model.ops,
    loss_chunk=0,
  )
  depth = model.fusion_layers

  strides = {
    f"skip-connected, stride {stride}": FusionEncoder(config=bert, depth=depth, stride=stride)
    for stride in range(1, depth + 1)
  }
  # By the paper's own rule, stride 0 connects every layer, and a stride as long as the stack none.
  return {
    "co-attention": CoAttention(config=bert, depth=depth),
    "connected": FusionEncoder(config=bert, depth=depth, stride=0, rule="paper"),
    **strides,
    "asymmetric": FusionEncoder(config=bert, depth=depth, stride=depth, rule="paper"),
  }


def operations(model: MPlug, network: nn.Module, length: int) -> int:
  """Counts the operations of a network for one pair of image and text.

  Args:
    model: model with the geometry of the layers.
    network: see `networks`.
    length: text tokens.
  """
  inputs = (
    jax.ShapeDtypeStruct((1, length, model.hidden_size), model.dtype),
    jax.ShapeDtypeStruct((1, length), jnp.bool_),
    jax.ShapeDtypeStruct((1, image_tokens(model), model.hidden_size), model.dtype),
  )
  params = jax.eval_shape(network.init, jax.random.key(0), *inputs)
  return traced.function_flops(network.apply, params, *inputs)


def measure(model: MPlug, batch: int, length: int, repeats: int) -> list[dict[str, Any]]:
  """Measures every network.

  All networks are compiled for this device; then they run in turns, so that other load of the
  machine affects all of them.

  Args:
    model: model with the geometry of the layers.
    batch: pairs of image and text.
    length: text tokens.
    repeats: measured runs of each network.

  Returns:
    A row of COLUMNS for each network. `gflop` (products only), `mbytes` (memory traffic by the
    compiler) and `seconds` (the median) are of one pair; `peak_mbytes` is the memory of the
    compiled program for the whole batch, parameters included.
  """
  rng = np.random.default_rng(0)
  text, image = (
    jnp.asarray(rng.standard_normal((batch, tokens, model.hidden_size), np.float32), model.dtype)
    for tokens in (length, image_tokens(model))
  )
  mask = jnp.ones((batch, length), bool)
  rows: dict[str, dict[str, Any]] = {}
  calls = {}
  pool = {}
  for name, network in networks(model).items():
    apply = jax.jit(lambda params, *inputs, network=network: network.apply(params, *inputs))
    params = _parameters(
      jax.eval_shape(network.init, jax.random.key(0), text, mask, image), pool, rng
    )
    compiled = apply.lower(params, text, mask, image).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    cost = compiled.cost_analysis() or {}
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    rows[name] = {
      "network": name,
      "gflop": operations(model, network, length) / 1e9,
      "mbytes": cost.get("bytes accessed", float("nan")) / batch / 1e6,
      "peak_mbytes": peak / 1e6,
      "paper_seconds": PAPER.get(name, float("nan")),
    }
    calls[name] = lambda compiled=compiled, params=params: jax.block_until_ready(
      compiled(params, text, mask, image)
    )
  seconds = {name: [] for name in calls}
  for turn in range(repeats + 1):
    for name, call in calls.items():
      start = time.perf_counter()
      call()
      if turn:  # The first one warms up.
        seconds[name].append((time.perf_counter() - start) / batch)
  for name, row in rows.items():
    row["seconds"] = statistics.median(seconds[name])
  return _with_ratios(rows)


def _with_ratios(rows: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns the rows with their ratios to asymmetric co-attention."""
  base = rows["asymmetric"]
  for row in rows.values():
    row |= {
      "gflop_ratio": row["gflop"] / base["gflop"],
      "seconds_ratio": row["seconds"] / base["seconds"],
      "paper_ratio": row["paper_seconds"] / base["paper_seconds"],
    }
  return [{column: row[column] for column in COLUMNS} for row in rows.values()]


def _parameters(
  spec: Any, pool: dict[tuple[tuple[int, ...], int], jax.Array], rng: np.random.Generator
) -> Any:
  """Returns random parameters.

  Networks share them by shape through `pool`, because eight of them do not fit into memory.
  """
  used: dict[tuple[int, ...], int] = {}

  def leaf(x: jax.ShapeDtypeStruct) -> jax.Array:
    number = used.get(x.shape, -1) + 1
    used[x.shape] = number
    if (x.shape, number) not in pool:
      pool[x.shape, number] = jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32))
    return pool[x.shape, number]

  return jax.tree.map(leaf, spec)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Formats the rows as lines of text.

  Args:
    rows: see `measure`.
  """
  lines = [
    f"{'':26}{'GFLOP':>8}{'MB moved':>10}{'peak MB':>9}{'seconds':>9}   relative to asymmetric: "
    f"{'GFLOP':>6}{'time':>7}{'paper':>7}"
  ]
  for row in rows:
    ratio = f"{row['paper_ratio']:7.2f}" if row["paper_ratio"] == row["paper_ratio"] else "      -"
    lines.append(
      f"{row['network']:26}{row['gflop']:8.1f}{row['mbytes']:10.0f}{row['peak_mbytes']:9.0f}"
      f"{row['seconds']:9.3f}{'':27}{row['gflop_ratio']:6.2f}{row['seconds_ratio']:7.2f}{ratio}"
    )
  return lines


def write(rows: Sequence[Mapping[str, Any]], stem: str | os.PathLike[str]) -> tuple[str, str]:
  """Writes `stem`.csv and `stem`.png and returns their paths.

  Args:
    rows: see `measure`.
    stem: path without extension.
  """
  with open(f"{stem}.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
  _plot(rows, f"{stem}.png")
  return f"{stem}.csv", f"{stem}.png"


def _plot(rows: Sequence[Mapping[str, Any]], path: str) -> None:
  """Draws operations, measured time and the paper's time relative to asymmetric co-attention."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
  positions = np.arange(len(rows))
  series = (
    ("gflop_ratio", "operations", "#9ecae1"),
    ("seconds_ratio", "time here", "#3182bd"),
    ("paper_ratio", "time in the paper", "#e6550d"),
  )
  for i, (column, label, color) in enumerate(series):
    values = np.array([row[column] for row in rows])
    bars = axes.bar(
      positions + 0.28 * (i - 1), np.nan_to_num(values), 0.26, label=label, color=color
    )
    axes.bar_label(bars, [f"{value:.1f}" if value == value else "" for value in values], fontsize=7)
  axes.set_xticks(positions, [row["network"].replace(", ", ",\n") for row in rows], fontsize=8)
  axes.set_ylabel("relative to asymmetric co-attention")
  axes.set_title("Forward pass of the fusion network")
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False)
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
