"""A sheet of sample images with texts and boxes."""

import functools
import io
import os
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mplug_jax.metrics.vqa_accuracy import exact_match
from mplug_jax.reporting.style import CELL, FRAME, GRAY, GREEN, INK, RED
from mplug_jax.runtime.atomic_files import write_atomic

if TYPE_CHECKING:
  from PIL.Image import Image as Picture
  from PIL.ImageFont import FreeTypeFont

_SOFTWARE = "mplug_jax"  # in the PNG, so that a sheet is known as one
_GAP = 26
_TEXT_SIZE = 15
_LINE_HEIGHT = 20
_TEXT_GAP = 9  # above each question
_MAX_ROWS = 4  # of one wrapped question, answer or truth


class Sample(NamedTuple):
  """Texts under an image.

  Attributes:
    question: the question or caption.
    prediction: the answer.
    truth: the right answer, "" if unknown.
    verdict: "right", "wrong", "open" (neither, shown with the truth), or "" to compare the
      prediction with the truth.
  """

  question: str
  prediction: str
  truth: str
  verdict: str = ""


def sample_sheet(
  images: Iterable[np.ndarray],
  lines: Sequence[Sequence[Sample]],
  out_path: str | os.PathLike[str],
) -> None:
  """Draws a grid of images, each with its questions, answers and truths beneath, as one PNG.

  A right answer (`exact_match`) is green, a wrong one red with the truth beside it, and an answer
  without a truth (a test split) gray. Small images are enlarged by a whole factor with sharp
  pixels, others scaled to the cell with bicubic filtering. Long texts are wrapped, very long ones
  cut with an ellipsis.

  Args:
    images: u8[N, H, W, 3], N >= 1, or a list of u8[H, W, 3].
    lines: the Samples of each image, or tuples of their fields.
    out_path: the PNG; replaced atomically.

  Raises:
    ValueError: wrong dtype or shape, or `lines` does not have one entry per image.
  """
  images = [np.asarray(image) for image in images]
  wrong = next((x for x in images if x.dtype != np.uint8 or x.ndim != 3 or x.shape[-1] != 3), None)
  if wrong is not None or not images:
    description = "none" if wrong is None else f"{wrong.dtype}{list(wrong.shape)}"
    raise ValueError(
      f"sample_sheet: images must be u8[N, H, W, 3] with N >= 1, or a list of u8[H, W, 3], not "
      f"{description}."
    )
  if len(images) != len(lines):
    raise ValueError(f"sample_sheet: {len(images)} images but texts for {len(lines)}.")
  cells = [_cell(image, samples) for image, samples in zip(images, lines, strict=True)]
  sheet = _grid(cells)
  buffer = io.BytesIO()
  from PIL.PngImagePlugin import PngInfo

  about = PngInfo()
  about.add_text("Software", _SOFTWARE)
  sheet.save(buffer, format="PNG", pnginfo=about)
  write_atomic(out_path, buffer.getvalue())


def is_sheet(path: str) -> bool:
  """Returns whether a file is a sheet of this module.

  Args:
    path: any file.
  """
  from PIL import Image

  try:
    with Image.open(path) as image:
      return image.info.get("Software") == _SOFTWARE
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # of Pillow
    return False


def _cell(image: np.ndarray, samples: Sequence[Sample]) -> "Picture":
  """Draws one image with its texts: a picture CELL wide and as high as its content."""
  from PIL import Image, ImageDraw

  picture = _enlarge(Image.fromarray(image))
  blocks = [_text_rows(Sample(*sample)) for sample in samples]
  text_height = sum(_TEXT_GAP + _LINE_HEIGHT * len(block) for block in blocks)
  cell = Image.new("RGB", (CELL, picture.height + text_height), "white")
  cell.paste(picture, (0, 0))
  draw = ImageDraw.Draw(cell)
  draw.rectangle((0, 0, picture.width - 1, picture.height - 1), outline=FRAME)
  y = picture.height
  for block in blocks:
    y += _TEXT_GAP
    for text, color in block:
      draw.text((0, y), text, fill=color, font=_font())
      y += _LINE_HEIGHT
  return cell


def _enlarge(picture: "Picture") -> "Picture":
  """Scales a picture to the cell; small pictures by a whole factor, so that they stay sharp."""
  from PIL import Image

  longest = max(picture.size)
  if 2 * longest <= CELL:
    factor = CELL // longest
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)
  width, height = (max(1, round(side * CELL / longest)) for side in picture.size)
  return picture.resize((width, height), Image.Resampling.BICUBIC)


def _text_rows(sample: Sample) -> list[tuple[str, str]]:
  """Returns the (text, color) rows of one question, its answer and, if that is wrong, the truth."""
  question, prediction, truth = (" ".join(str(text).split()) for text in sample[:3])
  answer = prediction or "(no answer)"
  verdict = sample.verdict or (
    "open" if not truth else "right" if exact_match(prediction, truth) else "wrong"
  )
  color = {"right": GREEN, "wrong": RED, "open": GRAY}[verdict]
  verdicts = [{"right": "\N{CHECK MARK} ", "wrong": "\N{BALLOT X} ", "open": ""}[verdict] + answer]
  if truth and verdict != "right":
    verdicts.append(f"(truth: {truth})")
    if _font().getlength("  ".join(verdicts)) <= CELL:
      verdicts = ["  ".join(verdicts)]
  return [(row, INK) for row in _wrap(question)] + [
    (row, color) for verdict in verdicts for row in _wrap(verdict)
  ]


def _wrap(text: str) -> list[str]:
  """Wraps a text to the width of a cell, measured in the font; long words are broken."""
  font = _font()
  columns = CELL
  while True:
    rows = textwrap.wrap(text, columns, break_on_hyphens=False) or [""]
    widest = max(rows, key=font.getlength)
    if columns == 1 or font.getlength(widest) <= CELL:
      break
    columns = max(1, min(columns - 1, int(len(widest) * CELL / font.getlength(widest))))
  if len(rows) > _MAX_ROWS:
    rows = rows[:_MAX_ROWS]
    last = rows[-1]
    while last and font.getlength(last + " …") > CELL:
      last = last[:-1]
    rows[-1] = last.rstrip() + " …"
  return rows


@functools.cache
def _font() -> "FreeTypeFont":
  """Returns DejaVu Sans, which comes with matplotlib and covers Latin, Greek and Cyrillic."""
  import matplotlib
  from PIL import ImageFont

  path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
  return ImageFont.truetype(path, _TEXT_SIZE)


def _grid(cells: Sequence["Picture"]) -> "Picture":
  """Arranges cells in rows of two to four, with the fewest gaps, on a white sheet."""
  from PIL import Image

  n = len(cells)
  columns = n
  if n >= 3:
    columns = min((2, 3, 4), key=lambda c: (c > n, -n % c, -c))
  rows = [cells[i : i + columns] for i in range(0, n, columns)]
  heights = [max(cell.height for cell in row) for row in rows]
  sheet = Image.new(
    "RGB", (columns * (CELL + _GAP) + _GAP, sum(heights) + _GAP * (len(rows) + 1)), "white"
  )
  top = _GAP
  for row, height in zip(rows, heights, strict=True):
    for i, cell in enumerate(row):
      sheet.paste(cell, (_GAP + i * (CELL + _GAP), top))
    top += height + _GAP
  return sheet
