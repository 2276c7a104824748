"""Curves, sample sheets and overlays: readable files with the right content."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from mplug_jax.reporting import curves, overlay, sample_sheet, style

GREEN = (23, 128, 61)
RED = (198, 40, 40)
GRAY = (107, 116, 128)


def write_lines(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def colors_of(path):
  with Image.open(path) as image:
    return {color for _, color in image.convert("RGB").getcolors(1 << 24)}


def test_curves_with_noise_gaps_and_a_torn_line(tmp_path):
  rng = np.random.default_rng(0)
  rows = [
    {"step": s, "loss": float(np.exp(-s / 300) + 0.01 * rng.random())} for s in range(0, 2000, 10)
  ]
  rows.insert(50, {"step": 501, "loss": None, "non_finite": {"loss": "nan"}})
  rows += [{"step": s, "test/accuracy": 30 + s / 30} for s in range(0, 2000, 500)]
  rows += [{"step": 3, "texts": {"loss": "a text"}}, {"step": 5, "steps_per_sec": 3.0}]
  path = write_lines(tmp_path / "metrics.jsonl", rows)
  with open(path, "a") as f:
    f.write('{"step": 2000, "los')
  out = tmp_path / "curves.png"
  curves.curves(path, out)
  with Image.open(out) as image:
    assert image.size == (1612, 546)
  assert sorted(os.listdir(tmp_path)) == ["curves.png", "metrics.jsonl"]


def test_the_only_term_of_a_loss_is_drawn_once(tmp_path):
  for other, names in ((2.01, ["train/loss"]), (3.0, ["train/loss", "train/loss_answer"])):
    rows = [
      {"step": 1, "train/loss": 4.0, "train/loss_answer": 4.01},
      {"step": 2, "train/loss": 2.0, "train/loss_answer": other},
    ]
    assert list(curves._series(write_lines(tmp_path / "m.jsonl", rows))) == names


def test_curves_of_a_single_panel_and_point(tmp_path):
  path = write_lines(tmp_path / "m.jsonl", [{"step": 0, "loss": 0.0}])
  curves.curves(path, tmp_path / "curves.png")
  with Image.open(tmp_path / "curves.png") as image:
    assert image.size == (806, 546)


def test_scores_and_rewards_have_panels_of_their_own(tmp_path):
  path = write_lines(
    tmp_path / "m.jsonl",
    [
      {
        "step": 0,
        "train/loss": 1.0,
        "train/reward": 1.3,
        "train/iou": 0.2,
        "test/CIDEr-D": 80.0,
        "test/CIDEr-D_seen": 90.0,
      }
    ],
  )
  curves.curves(path, tmp_path / "curves.png")
  with Image.open(tmp_path / "curves.png") as image:
    assert image.size == (3 * 806, 546)


def test_curves_with_nothing_to_draw(tmp_path):
  path = write_lines(tmp_path / "m.jsonl", [{"step": 0, "loss": None, "speed": 1.0}])
  with pytest.raises(ValueError, match="no finite loss or accuracy.*speed"):
    curves.curves(path, tmp_path / "curves.png")
  with pytest.raises(FileNotFoundError, match="no such metrics file"):
    curves.curves(tmp_path / "absent.jsonl", tmp_path / "curves.png")


def test_series_later_line_wins(tmp_path):
  rows = [{"step": 4, "loss": 1.0}, {"step": 2, "loss": 3.0}, {"step": 4, "loss": 0.5}]
  series = curves._series(write_lines(tmp_path / "m.jsonl", rows))
  np.testing.assert_array_equal(series["loss"], [[2, 3.0], [4, 0.5]])


def test_fractions_become_percent():
  np.testing.assert_allclose(curves._percent(np.array([[1, 0.5], [2, 1.0]])), [[1, 50], [2, 100]])
  np.testing.assert_allclose(curves._percent(np.array([[1, 0.5], [2, 97]])), [[1, 0.5], [2, 97]])


def test_running_mean_against_brute_force():
  values = np.random.default_rng(0).normal(size=200)
  half = 200 // 60
  expected = [values[i - r : i + r + 1].mean() for i in range(200) for r in [min(half, i, 199 - i)]]
  np.testing.assert_allclose(curves._running_mean(values), expected, atol=1e-12)


def test_sample_sheet_shows_pixels_and_verdicts(tmp_path):
  images = np.zeros((3, 64, 64, 3), np.uint8)
  images[:, 20:40, 20:40] = (200, 30, 220)
  lines = [
    [("what shape?", "circle", "circle")],
    [("what color?", "red", "blue"), ("is it red?", "Yes", "yes")],
    [("is there a box?", "no", "")],
  ]
  out = tmp_path / "sheet.png"
  sample_sheet.sample_sheet(images, lines, out)
  with Image.open(out) as image:
    width, height = image.size
    purple = np.all(np.asarray(image) == (200, 30, 220), axis=-1).sum()
  assert 900 <= width <= 1000
  assert 350 <= height <= 500
  assert purple == 3 * (20 * 4) ** 2  # enlarged four times, sharp
  assert {GREEN, RED, GRAY} <= colors_of(out)
  assert os.listdir(tmp_path) == ["sheet.png"]


@pytest.mark.parametrize(
  ("prediction", "present", "absent"), [("Blue", GREEN, RED), ("red", RED, GREEN), ("", RED, GREEN)]
)
def test_sample_sheet_color_follows_the_answer(tmp_path, prediction, present, absent):
  images = np.full((1, 300, 200, 3), 128, np.uint8)
  sample_sheet.sample_sheet(images, [[("q", prediction, "blue")]], tmp_path / "s.png")
  colors = colors_of(tmp_path / "s.png")
  assert present in colors
  assert absent not in colors


@pytest.mark.parametrize("text", ["word " * 400, "x" * 3000, "many\nlines\n" * 50, "", "été ΑΒΓ"])
def test_long_texts_stay_inside_their_cell(tmp_path, text):
  rows = sample_sheet._wrap(" ".join(text.split()))
  assert 1 <= len(rows) <= sample_sheet._MAX_ROWS
  assert max(sample_sheet._font().getlength(row) for row in rows) <= style.CELL
  images = np.zeros((2, 32, 48, 3), np.uint8)
  sample_sheet.sample_sheet(images, [[(text, text, text)], []], tmp_path / "s.png")
  with Image.open(tmp_path / "s.png") as image:
    assert image.size[0] < 700
    assert image.size[1] < 700


def test_wrap_keeps_all_words():
  text = "what color is the small shape that stands to the left of the big yellow triangle"
  assert " ".join(sample_sheet._wrap(text)) == text


def test_sample_sheet_of_wrong_input(tmp_path):
  images = np.zeros((2, 8, 8, 3), np.uint8)
  with pytest.raises(ValueError, match="2 images but texts for 1"):
    sample_sheet.sample_sheet(images, [[]], tmp_path / "s.png")
  with pytest.raises(ValueError, match=r"u8\[N, H, W, 3\].*float32"):
    sample_sheet.sample_sheet(images.astype(np.float32), [[], []], tmp_path / "s.png")
  assert os.listdir(tmp_path) == []


def test_overlay_is_bright_at_the_heat_and_has_the_box():
  image = np.full((48, 96, 3), 120, np.uint8)
  picture = overlay.overlay(image, np.array([[0.0, 0.0], [0.0, 2.0]]), [(6, 6, 30, 30)])
  assert picture.shape == (144, 288, 3)
  brightness = picture.astype(int).sum(-1)
  assert brightness[100:, 220:].mean() > 2 * brightness[60:100, :80].mean()
  assert (picture[18, 18:90] == (61, 245, 107)).all()
  assert (overlay.overlay(image, None)[:] == 120).all()
  assert (overlay.overlay(image, np.zeros((2, 2))) < 120).all()
