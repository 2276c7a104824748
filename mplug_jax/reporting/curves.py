"""Pictures of a run: loss and accuracy curves, and sheets of sample questions and answers.

matplotlib and Pillow are imported where they are used, so that importing this module costs nothing
and needs no display.
"""

import functools
import io
import math
import os
import re
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mplug_jax.metrics.vqa_accuracy import exact_match
from mplug_jax.reporting.metric_log import read_metrics
from mplug_jax.runtime.atomic_files import write_atomic

_COLORS = ("#1f6fb4", "#d1711c", "#2b8a57", "#8a4fa3", "#b23a48", "#5b6770")
_INK, _GREY, _GREEN, _RED = "#1d2530", "#6b7480", "#17803d", "#c62828"
_FRAME = "#c9ced6"
_BOX = "#3df56b"
_PANELS = {
  "loss": "loss",
  "accuracy (%)": "acc",
  "score (%)": "iou$|^CIDEr-D$|^r_mean$|^true$",
  "reward": "reward$",
}
_DECADES_FOR_LOG = 1.3  # a loss that falls by a factor of 20 is drawn on a logarithmic axis


class Sample(NamedTuple):
  """What a sheet says under an image. `verdict`: "right", "wrong", "open" (neither, with the truth beside it), or "" to
  compare the prediction with the truth."""

  question: str
  prediction: str
  truth: str
  verdict: str = ""


def curves(metrics_path: str | os.PathLike, out_path: str | os.PathLike) -> None:
  """Draws every loss, every accuracy and the chief scores of a metrics.jsonl against the step, as one PNG.

  The part of a name behind the last "/" tells its panel, see _PANELS. Accuracies and scores are drawn in percent: a series that
  never exceeds 1 is taken for a fraction. When a step stands twice, the later line counts. The loss axis is logarithmic if the loss
  spans a factor of 20.

  Raises:
    FileNotFoundError: there is no metrics file.
    ValueError: it holds nothing to draw.
  """
  series, panels = _series(metrics_path), []
  for title, pattern in _PANELS.items():
    group = {
      name: points for name, points in series.items() if re.search(pattern, name.rsplit("/", 1)[-1])
    }
    if group:
      panels.append(
        (
          title,
          {name: _percent(points) for name, points in group.items()} if "%" in title else group,
        )
      )
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


def _series(metrics_path: str | os.PathLike) -> dict[str, np.ndarray]:
  """{name: f64[N, 2]} of (step, finite value), steps ascending."""
  points: dict[str, dict[int, float]] = {}
  for row in read_metrics(metrics_path):
    for name, value in row.items():
      if name != "step" and isinstance(value, (int, float)):
        points.setdefault(name, {})[row["step"]] = value
  return {name: np.array(sorted(values.items()), np.float64) for name, values in points.items()}


def _percent(points: np.ndarray) -> np.ndarray:
  return points * (1.0, 100.0) if points[:, 1].max() <= 1.0 else points


def _draw_panel(axes, title: str, group: dict[str, np.ndarray]) -> None:
  from matplotlib.ticker import LogLocator, NullLocator

  for color, (name, points) in zip(_cycle(len(group)), group.items(), strict=True):
    steps, values = points.T
    if len(points) > 60:  # a dense, noisy series: pale itself, with its running mean on top
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
  axes.set_title(title, loc="left", color=_INK, fontsize=12, fontweight="bold")
  axes.set_xlabel("step", color=_GREY)
  axes.tick_params(colors=_GREY, labelsize=9)
  axes.grid(True, color="#e4e7eb", linewidth=0.8)
  axes.set_axisbelow(True)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
  axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="best")


def _cycle(n: int) -> list[str]:
  return [_COLORS[i % len(_COLORS)] for i in range(n)]


def _running_mean(values: np.ndarray) -> np.ndarray:
  """Centred mean over 1/30 of the series; the window shrinks at both ends."""
  half = max(1, len(values) // 60)
  sums = np.concatenate([[0.0], np.cumsum(values)])
  index = np.arange(len(values))
  reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
  return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def _save(figure, out_path: str | os.PathLike) -> None:
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", facecolor="white")
  write_atomic(out_path, buffer.getvalue())


def sample_sheet(
  images: Sequence[np.ndarray], lines: Sequence[Sequence[Sample]], out_path: str | os.PathLike
) -> None:
  """Draws a grid of images, each with its questions, answers and truths beneath, as one PNG.

  A right answer (`exact_match`) is green, a wrong one red with the truth beside it, and an answer
  without a truth (a test split) grey. Small images are enlarged by a whole factor with sharp
  pixels, others scaled to the cell with bicubic filtering. Long texts are wrapped, very long ones
  cut with an ellipsis.

  Args:
    images: u8[N, H, W, 3], N >= 1, or a list of u8[H, W, 3].
    lines: for each image its Samples, or tuples of their fields.
    out_path: the PNG; replaced atomically.

  Raises:
    ValueError: wrong dtype or shape, or `lines` has not one entry per image.
  """
  images = [np.asarray(image) for image in images]
  wrong = next((x for x in images if x.dtype != np.uint8 or x.ndim != 3 or x.shape[-1] != 3), None)
  if wrong is not None or not images:
    found = "none" if wrong is None else f"{wrong.dtype}{list(wrong.shape)}"
    raise ValueError(
      f"sample_sheet: images must be u8[N, H, W, 3] with N >= 1, or a list of u8[H, W, 3], not {found}."
    )
  if len(images) != len(lines):
    raise ValueError(f"sample_sheet: {len(images)} images but texts for {len(lines)}.")
  cells = [_cell(image, samples) for image, samples in zip(images, lines, strict=True)]
  sheet = _grid(cells)
  buffer = io.BytesIO()
  sheet.save(buffer, format="PNG")
  write_atomic(out_path, buffer.getvalue())


def overlay(
  image: np.ndarray, heat: np.ndarray | None, boxes: Sequence[Sequence[float]] = ()
) -> np.ndarray:
  """An image, the brighter and the more coloured the more of the heat is there, with boxes drawn on it.

  Args:
    image: u8[H, W, 3]; a small one is enlarged by a whole factor.
    heat: f32[G, G'], not negative, a grid over the whole image; its largest value gets the full colour, whatever it is. None: the boxes
      alone.
    boxes: corners (x1, y1, x2, y2) in pixels of `image`.

  Returns:
    u8[H', W', 3].
  """
  from PIL import Image, ImageDraw

  factor = max(1, _CELL // max(image.shape[:2]))
  picture = Image.fromarray(image).resize(
    (image.shape[1] * factor, image.shape[0] * factor), Image.NEAREST
  )
  picture = picture if heat is None else _heated(picture, np.asarray(heat, np.float32))
  for x1, y1, x2, y2 in boxes:
    corners = (x1 * factor, y1 * factor, max(x1, x2) * factor, max(y1, y2) * factor)
    ImageDraw.Draw(picture).rectangle(
      corners, outline=_BOX, width=max(2, round(max(picture.size) / 150))
    )
  return np.asarray(picture)


def _heated(picture, heat):
  """An RGB Pillow image under a map f32[G, G'] that is smoothed to its size: dark where there is none."""
  import matplotlib
  from PIL import Image

  heat = heat / heat.max() if heat.max() > 0 else heat
  smooth = np.clip(np.asarray(Image.fromarray(heat).resize(picture.size, Image.BICUBIC)), 0, 1)
  colour = 255 * matplotlib.colormaps["inferno"](smooth)[..., :3]
  smooth, pixels = smooth[..., None], np.asarray(picture, np.float32)
  return Image.fromarray(
    np.uint8(pixels * (0.35 + 0.65 * smooth) * (1 - 0.45 * smooth) + 0.45 * smooth * colour)
  )


_CELL = 288  # width of a cell in pixels, images being at most that wide and high
_GAP = 26
_TEXT_SIZE = 15
_LINE_HEIGHT = 20
_TEXT_GAP = 9  # above each question
_MAX_ROWS = 4  # of one wrapped question, answer or truth


def _cell(image: np.ndarray, samples: Sequence[Sample]):
  """One image with its texts: an RGB Pillow image, _CELL wide and as high as its content."""
  from PIL import Image, ImageDraw

  picture = _enlarge(Image.fromarray(image))
  blocks = [_text_rows(Sample(*sample)) for sample in samples]
  text_height = sum(_TEXT_GAP + _LINE_HEIGHT * len(block) for block in blocks)
  cell = Image.new("RGB", (_CELL, picture.height + text_height), "white")
  cell.paste(picture, (0, 0))
  draw = ImageDraw.Draw(cell)
  draw.rectangle((0, 0, picture.width - 1, picture.height - 1), outline=_FRAME)
  y = picture.height
  for block in blocks:
    y += _TEXT_GAP
    for text, color in block:
      draw.text((0, y), text, fill=color, font=_font())
      y += _LINE_HEIGHT
  return cell


def _enlarge(picture):
  """The picture scaled to the cell: whole factors of small ones stay sharp."""
  from PIL import Image

  longest = max(picture.size)
  if 2 * longest <= _CELL:
    factor = _CELL // longest
    return picture.resize((picture.width * factor, picture.height * factor), Image.NEAREST)
  size = [max(1, round(side * _CELL / longest)) for side in picture.size]
  return picture.resize(size, Image.BICUBIC)


def _text_rows(sample: Sample) -> list[tuple[str, str]]:
  """The (text, colour) rows of one question, its answer and, if that is wrong, the truth."""
  question, prediction, truth = (" ".join(str(text).split()) for text in sample[:3])
  answer = prediction or "(no answer)"
  verdict = sample.verdict or (
    "open" if not truth else "right" if exact_match(prediction, truth) else "wrong"
  )
  color = {"right": _GREEN, "wrong": _RED, "open": _GREY}[verdict]
  verdicts = [{"right": "\N{CHECK MARK} ", "wrong": "\N{BALLOT X} ", "open": ""}[verdict] + answer]
  if truth and verdict != "right":
    verdicts.append(f"(truth: {truth})")
    if _font().getlength("  ".join(verdicts)) <= _CELL:
      verdicts = ["  ".join(verdicts)]
  return [(row, _INK) for row in _wrap(question)] + [
    (row, color) for verdict in verdicts for row in _wrap(verdict)
  ]


def _wrap(text: str) -> list[str]:
  """Rows of at most the cell's width, measured in the font; words too long are broken."""
  font, columns = _font(), _CELL
  while True:
    rows = textwrap.wrap(text, columns, break_on_hyphens=False) or [""]
    widest = max(rows, key=font.getlength)
    if columns == 1 or font.getlength(widest) <= _CELL:
      break
    columns = max(1, min(columns - 1, int(len(widest) * _CELL / font.getlength(widest))))
  if len(rows) > _MAX_ROWS:
    rows = rows[:_MAX_ROWS]
    last = rows[-1]
    while last and font.getlength(last + " …") > _CELL:
      last = last[:-1]
    rows[-1] = last.rstrip() + " …"
  return rows


@functools.cache
def _font():
  """DejaVu Sans, which comes with matplotlib and covers Latin, Greek and Cyrillic."""
  import matplotlib
  from PIL import ImageFont

  path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
  return ImageFont.truetype(path, _TEXT_SIZE)


def _grid(cells):
  """Cells in rows of two to four, whichever leaves the fewest gaps, on a white sheet."""
  from PIL import Image

  n = len(cells)
  columns = n if n < 3 else min((2, 3, 4), key=lambda c: (c > n, -n % c, -c))
  rows = [cells[i : i + columns] for i in range(0, n, columns)]
  heights = [max(cell.height for cell in row) for row in rows]
  sheet = Image.new(
    "RGB", (columns * (_CELL + _GAP) + _GAP, sum(heights) + _GAP * (len(rows) + 1)), "white"
  )
  top = _GAP
  for row, height in zip(rows, heights, strict=True):
    for i, cell in enumerate(row):
      sheet.paste(cell, (_GAP + i * (_CELL + _GAP), top))
    top += height + _GAP
  return sheet
