"""Inputs of a Predictor: all forms of an image give the same row; texts are as in evaluation."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from mplug_jax.data.errors import ImageError
from mplug_jax.data.images import ops, video
from mplug_jax.data.text import sentencepiece
from mplug_jax.inference import inputs

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def encoded(image, **options):
  file = io.BytesIO()
  image.save(file, "PNG", **options)
  return file.getvalue()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return sentencepiece.train_sentencepiece(
    ["is the red circle left of the blue square"] * 3, 64, tmp_path_factory.mktemp("tokenizer")
  )


def test_every_form_of_an_image_is_the_same_row(tmp_path):
  path = tmp_path / "a.png"
  path.write_bytes(encoded(Image.fromarray(PIXELS)))
  forms = [
    str(path),
    path,
    path.read_bytes(),
    Image.fromarray(PIXELS),
    PIXELS,
    np.dstack([PIXELS, np.full((20, 30), 255, np.uint8)]),
  ]
  rows = inputs.ImageRows(16).resized(forms)["image"]
  assert rows.shape == (6, 16, 16, 3)
  assert all((row == ops.eval_transform(PIXELS, 16)).all() for row in rows)
  exif = Image.Exif()
  exif[0x0112] = 6
  turned = inputs.ImageRows(16).resized([encoded(Image.fromarray(PIXELS), exif=exif)])["image"][0]
  assert (turned == ops.eval_transform(np.rot90(PIXELS, -1).copy(), 16)).all()
  grey = inputs.ImageRows(16).resized([PIXELS[..., 0]])["image"][0]
  assert (grey[..., 0] == grey[..., 2]).all()


def test_boxes_know_the_size_and_place_of_the_image():
  rows = inputs.ImageRows(16).on_canvas([PIXELS, PIXELS[:, :20]])
  assert rows["size"].tolist() == [[30, 20], [20, 20]]
  assert rows["placed"].tolist() == [
    [0, 2, 16, 13],
    [0, 0, 16, 16],
  ]


def test_clips_are_frames_of_files_arrays_and_lists(tmp_path):
  frames = np.stack([np.full((16, 16, 3), 30 * i, np.uint8) for i in range(8)])
  video.write_mp4(tmp_path / "a.mp4", frames)
  rows = inputs.ImageRows(16, frames=4)
  chosen = frames[video.frame_numbers(8, 4)]
  forms = [frames, inputs.as_list([list(frames)])[0], str(tmp_path / "a.mp4")]
  assert all(map(inputs.is_clip, forms))
  of_array, of_list, of_file = (rows.resized([form])["image"][0] for form in forms)
  assert (of_array == chosen).all()
  assert (of_list == chosen).all()
  assert np.abs(of_file.astype(int) - chosen).max() < 8


@pytest.mark.parametrize(
  ("image", "message"),
  [
    (np.zeros((0, 4, 3), np.uint8), "zero pixels"),
    (Image.new("RGB", (0, 3)), "zero pixels"),
    ("none.png", "none.png does not exist"),
    (b"nothing", "not an image"),
    (inputs.Clip(()), "no frames"),
    (np.zeros((2, 4, 4, 3)), "float64"),
  ],
)
def test_images_that_show_nothing_are_refused(image, message):
  with pytest.raises(ImageError, match=message):
    inputs.ImageRows(16).resized([image])


def test_one_image_is_not_a_list():
  assert inputs.is_one(pathlib.Path("a.png"))
  assert inputs.is_one(PIXELS)
  assert not inputs.is_one([PIXELS])
  with pytest.raises(ValueError, match="list of images is empty"):
    inputs.as_list([])
  with pytest.raises(TypeError, match="not int"):
    inputs.as_list(3)


def test_texts_for_one_and_many_images():
  cases = [
    ("a", "q", ["q"], [(0,)], "r0"),
    ("a", ["q", "p"], ["q", "p"], [(0,), (0,)], ["r0", "r1"]),
    (["a", "b"], "q", ["q", "q"], [(0,), (1,)], ["r0", "r1"]),
    (["a", "b"], ["q", "p"], ["q", "p"], [(0,), (1,)], ["r0", "r1"]),
    (["a", "b"], ["q", ["p", "o"]], ["q", "p", "o"], [(0,), (1,), (1,)], ["r0", ["r1", "r2"]]),
  ]
  for images, texts, flat, requests, result in cases:
    _, results, asked, shape = inputs.pairs(images, texts, "question")
    assert (results, asked, shape([f"r{i}" for i in range(len(flat))])) == (flat, requests, result)
  _, results, asked, shape = inputs.pairs_of_images([("a", "b"), ("c", "d")], "s")
  assert (results, asked) == (["s", "s"], [(0, 1), (2, 3)])
  assert inputs.pairs_of_images(("a", "b"), "s")[3](["r"]) == "r"
  with pytest.raises(ValueError, match="2 images and 3 questions"):
    inputs.pairs(["a", "b"], ["q"] * 3, "question")
  with pytest.raises(ValueError, match="pair of images"):
    inputs.pairs_of_images(["a", "b", "c"], "s")


def test_texts_are_refused_or_cut_with_a_warning(tokenizer):
  rows = inputs.TextRows("question", tokenizer, 6)
  ids = tokenizer.encode("the red circle")
  assert rows(["the red circle"]).tolist() == [ids + [tokenizer.pad_id] * (6 - len(ids))]
  long = "is the red circle left of the blue square"
  with pytest.raises(ValueError, match="more than the 6 that the model takes.*truncate=True"):
    rows([long])
  with pytest.warns(UserWarning, match="the rest is cut"):
    assert rows([long], truncate=True).tolist() == [tokenizer.encode(long)[:6]]
  for empty in ("", " ", "\n"):
    with pytest.raises(ValueError, match="is empty"):
      rows([empty])
  with pytest.raises(ValueError, match="is empty"):
    inputs.TextRows("text", tokenizer, 6, max_words=4)(["?!"])
  with pytest.raises(ValueError, match="3 words, more than the 2"):
    inputs.TextRows("text", tokenizer, 9, max_words=2)(["the red circle"])
  with pytest.raises(TypeError, match="not int"):
    rows([3])
