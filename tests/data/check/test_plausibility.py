"""Implausible boxes and images in `tools.prepare_data check`, and in a sample before training."""

import json

import numpy as np
import pytest
from PIL import Image

from configs import grounding as grounding_config
from mplug_jax import data as data_lib
from mplug_jax.data import check as data_check
from mplug_jax.data.sources.chunked import Chunked
from tools import prepare_data


@pytest.fixture
def folder(tmp_path):
  """Twelve images, 20 pixels high and from 30 to 41 wide."""
  rng = np.random.default_rng(0)
  for i in range(12):
    Image.fromarray(rng.integers(0, 256, (20, 30 + i, 3), np.uint8)).save(tmp_path / f"{i}.png")
  return tmp_path


def write(folder, rows, name="train.jsonl"):
  (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(folder / name)


def check(capsys, *arguments):
  """Returns (exit status, printed lines, stderr)."""
  status = prepare_data.main(["check", *map(str, arguments)])
  printed = capsys.readouterr()
  return status, printed.out.splitlines(), printed.err


def boxes(folder, *corners, **changes):
  """Writes entries with these boxes; image i is 30 + i pixels wide and 20 high."""
  rows = [
    {"image": f"{i % 12}.png", "text": "a dog", "box": box, "id": i, **changes}
    for i, box in enumerate(corners)
  ]
  return write(folder, rows)


def warnings_of(lines):
  return [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]


def test_boxes_as_shares_of_the_image(folder, capsys):
  path = boxes(folder, *[[0.1, 0.2, 0.6, 0.7]] * 4)
  _, lines, _ = check(capsys, path, "--task=grounding")
  (warning,) = warnings_of(lines)
  assert warning.startswith("4 of 4 boxes lie within one pixel: they look like shares of the image")
  assert f"(0.1, 0.2, 0.6, 0.7) of 'a dog' in {folder}/0.png of 30 x 20 pixels" in warning


def test_boxes_with_sizes_instead_of_ends(folder, capsys):
  path = boxes(folder, [2, 2, 25, 15], [20, 5, 8, 10], [3, 12, 20, 6], [15, 10, 10, 8])
  status, lines, _ = check(capsys, path, "--task=grounding")
  assert status == 0
  warnings = warnings_of(lines)
  assert warnings[3].startswith(
    "3 of 4 boxes end before they begin: they look like [x, y, width, height] or [center x, center"
  )
  assert f"(first: {folder}/train.jsonl, line 2: the box [20.0, 5.0, 8.0, 10.0])" in warnings[3]
  assert len(warnings) == 4
  assert warnings[2].startswith(f"{folder}/train.jsonl, line 4: the box [15.0, 10.0, 10.0, 8.0] is")
  status, _, error = check(
    capsys, boxes(folder, [20, 5, 8, 10], [3, 12, 20, 6]), "--task=grounding"
  )
  assert status == 1
  assert "None of the boxes of" in error
  assert "2 of 2 boxes end before they begin: they look like [x, y, width, height]" in error


def test_one_empty_box_is_no_order_of_numbers(folder, capsys):
  path = boxes(folder, *[[2, 2, 25, 15]] * 3, [20, 5, 8, 10])
  _, lines, _ = check(capsys, path, "--task=grounding")
  (warning,) = warnings_of(lines)
  assert warning.startswith(
    f"{folder}/train.jsonl, line 4: the box [20.0, 5.0, 8.0, 10.0] is empty"
  )


def test_boxes_of_an_image_that_exif_turns(folder, capsys):
  exif = Image.Exif()
  exif[0x0112] = 6
  pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
  Image.fromarray(pixels).save(folder / "turned.jpg", exif=exif)  # shown 20 wide and 40 high
  path = boxes(folder, [25, 2, 38, 18], [2, 25, 18, 38], image="turned.jpg")
  _, lines, _ = check(capsys, path, "--task=grounding")
  assert any(
    warning.startswith("1 of 2 boxes fit their image as it is stored, but not as its EXIF")
    and f"{folder}/turned.jpg of 20 x 40 pixels" in warning
    for warning in warnings_of(lines)
  )


def test_values_of_images(folder, capsys):
  deep = np.random.default_rng(0).integers(0, 4096, (20, 30)).astype(np.uint16)
  Image.fromarray(deep).save(folder / "0.png")
  Image.fromarray(np.eye(20, dtype=np.uint8)).save(folder / "1.png")
  rows = [{"image": f"{i}.png", "question": "what?", "answer": "a dog"} for i in range(12)]
  _, lines, _ = check(capsys, write(folder, rows), "--task=vqa")
  warnings = warnings_of(lines)
  assert any(
    text.startswith("1 of 12 images have 16 bits a value and no value above 4095")
    and f"(first: {folder}/0.png)" in text
    for text in warnings
  )
  assert any(
    text.startswith("1 of 12 images are black, with no value above 1 of 255")
    and f"(first: {folder}/1.png)" in text
    for text in warnings
  )


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_sample_before_training_says_the_same(folder, split):
  path = boxes(folder, *[[0.1, 0.2, 0.6, 0.7]] * 4)
  c = grounding_config.get_config(f"tiny,data=jsonl,root={folder}").unlock()
  c.data.update({"train_files": (path,), "val_file": path, "allow_overlap": True})
  source = data_lib.get_source(c, split)
  (warning,) = data_check.sample_warnings(c, source)
  assert warning.startswith("4 of 4 boxes lie within one pixel")
  chunked = Chunked(source, 1, "expressions")
  assert data_check.sample_warnings(c, chunked) == [warning]
  write(folder, [{"image": "0.png", "text": "a dog", "box": [2, 2, 25, 15]}])
  assert data_check.sample_warnings(c, data_lib.get_source(c, split)) == []
