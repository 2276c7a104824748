"""Values of images: which are implausible, and that ordinary images are not."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mplug_jax.data.check import image_values
from mplug_jax.data.images import ops


def encoded(pixels, form="PNG", **options):
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, form, **options)
  return buffer.getvalue()


def kind_of(data):
  return image_values.kind(data, ops.decode_image(data))


def noise(largest, dtype=np.uint8, shape=(12, 16)):
  pixels = np.random.default_rng(0).integers(0, largest + 1, shape).astype(dtype)
  pixels[0, 0] = largest
  pixels[0, 1] = 0
  return pixels


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize(
  ("largest", "kind", "shown"),
  [
    (255, image_values.DEEP, 255),
    (1023, image_values.DEEP, 1023),
    (4095, image_values.DEEP, 4095),
    (16383, "", 63),
    (65535, "", 255),
  ],
)
def test_few_of_16_bits_are_implausible(form, largest, kind, shown):
  assert kind_of(encoded(noise(largest, np.uint16), form)) == (kind, shown)


@pytest.mark.parametrize(
  ("pixels", "kind"),
  [
    (noise(1, shape=(12, 16, 3)), image_values.BLACK),
    (np.zeros((12, 16, 3), np.uint8), image_values.BLACK),
    (np.full((12, 16), 7, np.uint8), image_values.FLAT),
    (np.full((12, 16, 3), (200, 10, 10), np.uint8), image_values.FLAT),
    (noise(15), ""),
    (noise(255, shape=(12, 16, 3)), ""),
  ],
)
def test_images_of_8_bits(pixels, kind):
  assert kind_of(encoded(pixels))[0] == kind


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
  height=st.integers(2, 40),
  width=st.integers(2, 40),
  seed=st.integers(0, 1000),
  dtype=st.sampled_from([np.uint8, np.uint16]),
)
def test_noise_of_the_whole_range_is_plausible(height, width, seed, dtype):
  top = np.iinfo(dtype).max
  pixels = np.random.default_rng(seed).integers(0, top, (height, width), endpoint=True)
  pixels[0, :2] = 0, top
  assert kind_of(encoded(pixels.astype(dtype)))[0] == ""


def test_sentences_have_numbers_and_the_first_image():
  assert image_values.warnings({}, 5) == []
  deep, black = image_values.warnings(
    {image_values.DEEP: [("a.png", 4095)] * 2, image_values.BLACK: [("b.png", 1)]}, 5
  )
  assert deep == (
    "2 of 5 images have 16 bits a value and no value above 4095, and so are almost black: they "
    "look like 12 bits or fewer in 16 (first: a.png); scale them to 0 to 65535."
  )
  assert black.startswith("1 of 5 images are black, with no value above 1 of 255")


def test_images_of_one_color_are_implausible_if_most_are():
  flat = {image_values.FLAT: [(f"{i}.png", 200) for i in range(3)]}
  assert image_values.warnings(flat, 7) == []
  (sentence,) = image_values.warnings(flat, 6)
  assert sentence == "3 of 6 images have one color everywhere (first: 0.png); look at them."


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_image_is_known_by_its_tag(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encoded(noise(255, shape=(12, 16, 3)), "JPEG", exif=exif)
  assert image_values.is_turned(data) == (orientation >= 5)
  assert (ops.decode_image(data).shape[:2] == (16, 12)) == (orientation >= 5)


def test_a_damaged_image_is_not_turned():
  assert not image_values.is_turned(b"no image")
