"""The paper's efficiency study: what each way to fuse image and text costs (mPLUG, Li et al. 2022, section 3.2, figures 1, 3 and 4).

Forward pass of the fusion network alone, on tokens that the encoders would give: co-attention (two
streams, each with self-attention and cross-attention to the other), connected attention (every
layer over image and text together), asymmetric co-attention (text reads the image, which no layer
changes) and skip-connected fusion at every stride. The number of layers is the same for all.
"""

import csv
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.flops import layers
from mplug_jax.models.bert import BertConfig, BertLayer, Memory
from mplug_jax.models.fusion import FusionEncoder

# Seconds for the forward pass of 100 samples in the paper, which does not name the hardware:
# figures 1 and 4 for the first two, figure 3 (ViT-B) for the rest. Read off the figures.
PAPER = {
  "co-attention": 1.86,
  "connected": 1.65,
  "skip-connected, stride 1": 1.65,
  "skip-connected, stride 2": 1.03,
  "skip-connected, stride 3": 0.41,
  "skip-connected, stride 6": 0.28,
  "asymmetric": 0.28,
}
COLUMNS = (
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


class CoAttention(nn.Module):
  """Two streams of as many layers, each with self-attention, cross-attention to the other stream, and a feed-forward part."""

  config: BertConfig
  depth: int

  @nn.compact
  def __call__(self, text, mask, image):
    """text: f[B, L, D].

    Mask: bool[B, L]; image: f[B, N, D] -> (image, text), of the same shapes.
    """
    for j in range(self.depth):
      read = Memory((text,), (mask,))
      from_text, _ = BertLayer(self.config, cross=True, name=f"image_{j}")(
        image, None, read, read.mask
      )
      text, _ = BertLayer(self.config, cross=True, name=f"text_{j}")(
        text, mask[:, None, None, :], Memory((image,), (None,))
      )
      image = from_text
    return image, text


def networks(model):
  """{name: (module, operations for one pair of image and text of `length` tokens: length -> int)}, dearest first. `model`: an MPlug."""
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
    loss_chunk=0,
  )
  depth = model.fusion_layers

  def skip_connected(stride, rule="released"):
    geometry = model.clone(stride=stride, fusion=rule)
    return FusionEncoder(bert, depth, stride, rule), lambda length: layers.fusion_encoder(
      geometry, 1, 1, length
    )

  strides = {
    f"skip-connected, stride {stride}": skip_connected(stride) for stride in range(1, depth + 1)
  }
  # By the paper's own rule, stride 0 connects every layer, and a stride as long as the stack none.
  return {
    "co-attention": (
      CoAttention(bert, depth),
      lambda length: depth * layers.co_attention_layer(model, 1, length),
    ),
    "connected": skip_connected(0, "paper"),
    **strides,
    "asymmetric": skip_connected(depth, "paper"),
  }


def measure(model, batch, length, repeats):
  """Rows of COLUMNS, a dictionary for every network.

  Every network is compiled for this device; then they run in turns, so that what else the machine
  does falls on all alike. `gflop` (products alone, see flops.py), `mbytes` (memory traffic by the
  compiler) and `seconds` (the median) are of one pair of image and text, `peak_mbytes` is what the
  compiled program needs for the whole batch, parameters included.
  """
  rng = np.random.default_rng(0)
  shapes = (
    (batch, length, model.hidden_size),
    (batch, layers.image_tokens(model), model.hidden_size),
  )
  text, image = (
    jnp.asarray(rng.standard_normal(shape, np.float32), model.dtype) for shape in shapes
  )
  mask, rows, calls, pool = jnp.ones((batch, length), bool), {}, {}, {}
  for name, (network, operations) in networks(model).items():
    apply = jax.jit(lambda params, *inputs, network=network: network.apply(params, *inputs))
    params = _parameters(
      jax.eval_shape(network.init, jax.random.key(0), text, mask, image), pool, rng
    )
    compiled = apply.lower(params, text, mask, image).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    rows[name] = {
      "network": name,
      "gflop": operations(length) / 1e9,
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
      if turn:  # the first one warms up
        seconds[name].append((time.perf_counter() - start) / batch)
  for name, row in rows.items():
    row["seconds"] = statistics.median(seconds[name])
  base = rows["asymmetric"]
  for row in rows.values():
    row |= {
      "gflop_ratio": row["gflop"] / base["gflop"],
      "seconds_ratio": row["seconds"] / base["seconds"],
      "paper_ratio": row["paper_seconds"] / base["paper_seconds"],
    }
  return [{column: row[column] for column in COLUMNS} for row in rows.values()]


def _parameters(spec, pool, rng):
  """Random parameters.

  Networks share them by shape through `pool`, or eight of them would not fit beside each other.
  """
  used = {}

  def leaf(x):
    number = used[x.shape] = used.get(x.shape, -1) + 1
    if (x.shape, number) not in pool:
      pool[x.shape, number] = jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32))
    return pool[x.shape, number]

  return jax.tree.map(leaf, spec)


def table(rows):
  """Lines of text."""
  lines = [
    f"{'':26}{'GFLOP':>8}{'MB moved':>10}{'peak MB':>9}{'seconds':>9}   relative to asymmetric: "
    f"{'GFLOP':>6}{'time':>7}{'paper':>7}"
  ]
  for row in rows:
    ratio = f"{row['paper_ratio']:7.2f}" if row["paper_ratio"] == row["paper_ratio"] else "      -"
    lines.append(
      f"{row['network']:26}{row['gflop']:8.1f}{row['mbytes']:10.0f}{row['peak_mbytes']:9.0f}{row['seconds']:9.3f}"
      f"{'':27}{row['gflop_ratio']:6.2f}{row['seconds_ratio']:7.2f}{ratio}"
    )
  return lines


def write(rows, stem):
  """Leaves `stem`.csv and `stem`.png -> their paths."""
  with open(f"{stem}.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
  _plot(rows, f"{stem}.png")
  return f"{stem}.csv", f"{stem}.png"


def _plot(rows, path):
  """Bars of each network relative to asymmetric co-attention: operations, time here, the paper's time."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
  places = np.arange(len(rows))
  series = (
    ("gflop_ratio", "operations", "#9ecae1"),
    ("seconds_ratio", "time here", "#3182bd"),
    ("paper_ratio", "time in the paper", "#e6550d"),
  )
  for i, (column, label, color) in enumerate(series):
    values = np.array([row[column] for row in rows])
    bars = axes.bar(places + 0.28 * (i - 1), np.nan_to_num(values), 0.26, label=label, color=color)
    axes.bar_label(bars, [f"{value:.1f}" if value == value else "" for value in values], fontsize=7)
  axes.set_xticks(places, [row["network"].replace(", ", ",\n") for row in rows], fontsize=8)
  axes.set_ylabel("relative to asymmetric co-attention")
  axes.set_title("Forward pass of the fusion network")
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False)
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
