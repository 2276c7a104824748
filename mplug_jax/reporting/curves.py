"""Loss and accuracy curves of a run.

matplotlib is imported on use, so that importing this module is fast and needs no display.
"""

import io
import math
import os
import re
from typing import TYPE_CHECKING

import numpy as np

from mplug_jax.reporting.metric_log import read_metrics
from mplug_jax.reporting.style import GRAY, INK
from mplug_jax.runtime.atomic_files import write_atomic

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

_COLORS = ("#1f6fb4", "#d1711c", "#2b8a57", "#8a4fa3", "#b23a48", "#5b6770")
_PANELS = {  # title -> regex of the last part of a name
  "loss": "loss",
  "accuracy (%)": "acc",
  "score (%)": "iou$|^CIDEr-D$|^r_mean$|^true$",
  "reward": "reward$",
}
_DECADES_FOR_LOG = 1.3  # a loss that falls by a factor of 20 is drawn on a logarithmic axis


def curves(metrics_path: str | os.PathLike[str], out_path: str | os.PathLike[str]) -> None:
  """Draws losses, accuracies and main scores of a metrics.jsonl over the steps, as one PNG.

  The part of a name after the last "/" selects its panel, see _PANELS. Accuracies and scores are
  drawn in percent: a series that never exceeds 1 counts as a fraction. If a step occurs twice, the
  later line counts. A loss's only term, which equals it, is not drawn. The loss axis is logarithmic
  if the loss spans a factor of 20.

  Args:
    metrics_path: the metrics.jsonl.
    out_path: the PNG.

  Raises:
    FileNotFoundError: there is no metrics file.
    ValueError: it has nothing to draw.
  """
  series = _series(metrics_path)
  panels = []
  for title, pattern in _PANELS.items():
    group = {
      name: points for name, points in series.items() if re.search(pattern, name.rsplit("/", 1)[-1])
    }
    if "%" in title:
      group = {name: _percent(points) for name, points in group.items()}
    if group:
      panels.append((title, group))
  if not panels:
    raise ValueError(
      f"{metrics_path}: no finite loss or accuracy to draw; names present: "
      f"{', '.join(sorted(series)) or 'none'}."
    )
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(6.2 * len(panels), 4.2), dpi=130, layout="constrained")
  FigureCanvasAgg(figure)  # without pyplot: no global state, no display
  for axes, (title, group) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
    _draw_panel(axes, title, group)
  _save(figure, out_path)


def _series(metrics_path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Returns {name: f64[N, 2]} of (step, finite value), steps ascending."""
  points: dict[str, dict[int, float]] = {}
  for row in read_metrics(metrics_path):
    for name, value in row.items():
      if name != "step" and isinstance(value, (int, float)):
        points.setdefault(name, {})[row["step"]] = value
  series = {name: np.array(sorted(values.items()), np.float64) for name, values in points.items()}
  return {name: values for name, values in series.items() if not _is_only_term(name, series)}


def _is_only_term(name: str, series: dict[str, np.ndarray]) -> bool:
  """Returns whether `name` is "(split)/loss_(term)" and equals "(split)/loss", up to rounding."""
  total = name.partition("loss_")[0] + "loss"
  return (
    name.startswith(f"{total}_")
    and total in series
    and series[name].shape == series[total].shape
    and np.allclose(series[name], series[total], rtol=0.01)
  )


def _percent(points: np.ndarray) -> np.ndarray:
  return points * (1.0, 100.0) if points[:, 1].max() <= 1.0 else points


def _draw_panel(axes: "Axes", title: str, group: dict[str, np.ndarray]) -> None:
  from matplotlib.ticker import LogLocator, NullLocator

  for color, (name, points) in zip(_cycle(len(group)), group.items(), strict=True):
    steps, values = points.T
    if len(points) > 60:  # a dense, noisy series: drawn pale, with its running mean on top
      axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
      values = _running_mean(values)
    label = f"{name} (last {values[-1]:.4g})"
    axes.plot(
      steps,
      values,
      color=color,
      linewidth=1.8,
      label=label,
      marker="o" if len(points) <= 30 else None,
      markersize=4,
    )
  values = np.concatenate([points[:, 1] for points in group.values()])
  if (
    title == "loss"
    and values.min() > 0
    and math.log10(values.max() / values.min()) >= _DECADES_FOR_LOG
  ):
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
  elif title != "loss":
    axes.set_ylim(0, 102)
  axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold")
  axes.set_xlabel("step", color=GRAY)
  axes.tick_params(colors=GRAY, labelsize=9)
  axes.grid(True, color="#e4e7eb", linewidth=0.8)
  axes.set_axisbelow(True)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
  axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")


def _cycle(n: int) -> list[str]:
  return [_COLORS[i % len(_COLORS)] for i in range(n)]


def _running_mean(values: np.ndarray) -> np.ndarray:
  """Returns the centered mean over 1/30 of the series; the window shrinks at both ends."""
  half = max(1, len(values) // 60)
  sums = np.concatenate([[0.0], np.cumsum(values)])
  index = np.arange(len(values))
  reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
  return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def _save(figure: "Figure", out_path: str | os.PathLike[str]) -> None:
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", facecolor="white")
  write_atomic(out_path, buffer.getvalue())
