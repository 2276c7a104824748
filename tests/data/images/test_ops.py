"""Decoding of all kinds of files, and the transforms, against Pillow and hand-made arrays."""

import contextlib
import io

import cv2
import numpy as np
import pytest
from PIL import Image

from mplug_jax.data.errors import ImageError
from mplug_jax.data.images import ops


def _picture(height=48, width=64, channels=3, seed=0):
  """Smooth random colors, u8[H, W, C]."""
  small = np.random.default_rng(seed).integers(0, 256, (6, 8, channels), dtype=np.uint8)
  picture = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
  return picture.reshape(height, width, channels)


def _encode(image, format, **options):
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"progressive": True},
    {"subsampling": 0},
    {"subsampling": 1},
    {"keep_rgb": True},
    {"quality": 30},
    {"quality": 100, "subsampling": 2},
  ],
)
def test_jpeg_equals_pillow(options):
  data = _encode(_picture(51, 67), "JPEG", **options)
  expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
  decoded = ops.decode_image(data)
  np.testing.assert_array_equal(decoded, expected)
  assert decoded.dtype == np.uint8
  assert decoded.flags.c_contiguous


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_paths_bytes_and_pil_images(format, tmp_path):
  picture = _picture()
  path = tmp_path / f"a picture.{format.lower()}"
  path.write_bytes(_encode(picture, format))
  for image in (path, str(path), path.read_bytes(), Image.open(path), picture):
    np.testing.assert_array_equal(ops.decode_image(image), picture)


def test_grayscale_cmyk_palette_and_16_bits():
  gray = _picture()[..., 0]
  expected = np.stack([gray] * 3, -1)
  np.testing.assert_array_equal(ops.decode_image(_encode(gray, "PNG")), expected)
  np.testing.assert_array_equal(ops.decode_image(gray), expected)
  np.testing.assert_array_equal(ops.decode_image(gray[..., None]), expected)
  assert ops.decode_image(_encode(gray, "JPEG", quality=100)).shape == (48, 64, 3)

  # 16 bits: the high byte; the low one must not leak.
  deep = (gray.astype(np.uint16) << 8) + 200
  for image in (deep, _encode(deep, "PNG"), _encode(deep, "TIFF")):
    np.testing.assert_array_equal(ops.decode_image(image), expected)
  deep_color = (_picture().astype(np.uint16) << 8) + 77
  png = cv2.imencode(".png", deep_color[..., ::-1])[1].tobytes()
  np.testing.assert_array_equal(ops.decode_image(png), _picture())

  palette = Image.fromarray(_picture()).quantize(16)
  np.testing.assert_array_equal(
    ops.decode_image(_encode(palette, "GIF")), np.asarray(palette.convert("RGB"))
  )
  red = Image.new("CMYK", (5, 4), (0, 255, 255, 0))
  decoded = ops.decode_image(_encode(red, "JPEG", quality=100))
  assert decoded.shape == (4, 5, 3)
  assert np.abs(decoded.astype(int) - (255, 0, 0)).max() <= 3


def test_transparency_becomes_white():
  picture = np.full((2, 3, 4), (200, 100, 0, 255), np.uint8)
  picture[0, :, 3] = 0
  picture[1, 2, 3] = 51  # one fifth opaque
  expected = np.full((2, 3, 3), (200, 100, 0), np.uint8)
  expected[0] = 255
  expected[1, 2] = (244, 224, 204)
  np.testing.assert_array_equal(ops.decode_image(picture), expected)
  np.testing.assert_array_equal(ops.decode_image(_encode(picture, "PNG")), expected)
  keyed = _encode(Image.new("RGB", (2, 2), (9, 9, 9)), "PNG", transparency=(9, 9, 9))
  np.testing.assert_array_equal(ops.decode_image(keyed), np.full((2, 2, 3), 255))
  indexed = Image.new("P", (2, 1), 1)
  indexed.putpalette([0, 0, 0, 10, 20, 30])
  indexed.putpixel((0, 0), 0)
  np.testing.assert_array_equal(
    ops.decode_image(_encode(indexed, "PNG", transparency=0)),
    [[[255, 255, 255], [10, 20, 30]]],
  )


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize(
  ("orientation", "upright"),
  [
    (1, lambda a: a),
    (2, lambda a: a[:, ::-1]),
    (3, lambda a: a[::-1, ::-1]),
    (4, lambda a: a[::-1]),
    (5, lambda a: a.swapaxes(0, 1)),
    (6, lambda a: np.rot90(a, -1)),
    (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)),
    (8, lambda a: np.rot90(a, 1)),
  ],
)
def test_exif_rotation(format, orientation, upright):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = _encode(_picture(), format, exif=exif)
  stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
  np.testing.assert_array_equal(ops.decode_image(data), upright(stored))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_broken_exif_keeps_the_pixels():
  exif = Image.Exif()
  exif[0x0112] = 6
  for broken in (b"Exif\x00\x00rubbish", exif.tobytes()[:-9]):
    data = _encode(_picture(), "JPEG", exif=broken)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(ops.decode_image(data), expected)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF"])
def test_truncated_and_corrupt_files_name_the_path(format, tmp_path):
  data = _encode(_picture(200, 200), format)
  path = tmp_path / "broken.img"
  for content in (data[: len(data) // 2], data[:40], b"", b"\x00" + data, b"no image at all"):
    path.write_bytes(content)
    with pytest.raises(ImageError, match="broken.img cannot be read"):
      ops.decode_image(path)
  with pytest.raises(ImageError, match="record 7"):
    ops.decode_image(data[:40], name="record 7")
  with pytest.raises(ImageError, match="gone.png does not exist"):
    ops.decode_image(tmp_path / "gone.png")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_raise_only_image_error():
  rng = np.random.default_rng(0)
  for format in ("JPEG", "PNG", "GIF", "TIFF"):
    data = np.frombuffer(_encode(_picture(), format), np.uint8)
    for _ in range(40):
      damaged = data.copy()
      damaged[rng.integers(len(data), size=8)] = rng.integers(0, 256, 8)
      with contextlib.suppress(ImageError):
        assert ops.decode_image(damaged.tobytes()).ndim == 3


def test_size_limit_is_checked_before_decoding(monkeypatch):
  data = _encode(_picture(), "PNG")
  monkeypatch.setattr(ops, "MAX_PIXELS", 64 * 48)
  ops.decode_image(data)
  monkeypatch.setattr(ops, "MAX_PIXELS", 64 * 48 - 1)
  with pytest.raises(ImageError, match="64 x 48 pixels"):
    ops.decode_image(data)
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own check
  with pytest.raises(ImageError, match="cannot be read"):
    ops.decode_image(data)


@pytest.mark.parametrize(
  "array",
  [
    np.zeros((4, 4, 3), np.float32),
    np.zeros((4, 4, 2), np.uint8),
    np.zeros((0, 4, 3), np.uint8),
    np.zeros((1, 4, 4, 3), np.uint8),
  ],
)
def test_unsupported_arrays_are_errors(array):
  with pytest.raises(ImageError, match="expected uint8 or uint16"):
    ops.decode_image(array)


def test_float_files_and_other_types_are_errors():
  data = _encode(np.zeros((4, 4), np.float32), "TIFF")
  with pytest.raises(ImageError, match="neither 8 nor 16 bits"):
    ops.decode_image(data)
  with pytest.raises(TypeError, match="not NoneType"):
    ops.decode_image(None)


def test_eval_transform_is_pillow_bicubic_of_the_whole_image():
  picture = _picture(100, 150)
  expected = Image.fromarray(picture).resize((32, 32), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(ops.eval_transform(picture, 32), np.asarray(expected))
  np.testing.assert_array_equal(ops.eval_transform(_picture(32, 32), 32), _picture(32, 32))


def test_crop_boxes_have_the_right_distribution():
  rng = np.random.default_rng(1)
  boxes = np.array(
    [ops.random_crop_box(400, 500, rng, (0.2, 0.6), (3 / 4, 4 / 3)) for _ in range(4000)]
  )
  top, left, h, w = boxes.T
  assert top.min() >= 0
  assert left.min() >= 0
  assert (top + h).max() <= 400
  assert (left + w).max() <= 500
  area = h * w / 200_000
  log_ratio = np.log(w / h) / np.log(4 / 3)
  # The largest boxes, 400 x 300 and 300 x 400, fit: none is rejected and both stay uniform.
  deciles = np.linspace(0.1, 0.9, 9)
  np.testing.assert_allclose(np.quantile(area, deciles), 0.2 + 0.4 * deciles, atol=0.015)
  np.testing.assert_allclose(np.quantile(log_ratio, deciles), 2 * deciles - 1, atol=0.08)
  np.testing.assert_allclose(np.quantile(left / (500 - w), deciles), deciles, atol=0.03)
  np.testing.assert_allclose(np.quantile(top / (400 - h), deciles), deciles, atol=0.03)


@pytest.mark.parametrize(
  ("height", "width", "box"),
  [
    (100, 1000, (0, 433, 100, 133)),  # too wide: central 4:3
    (1000, 90, (440, 0, 120, 90)),  # too tall: central 3:4
  ],
)
def test_crop_falls_back_to_the_center(height, width, box):
  rng = np.random.default_rng(0)
  assert ops.random_crop_box(height, width, rng, (1, 1), (3 / 4, 4 / 3)) == box


def test_train_transform_without_augmentation_is_the_eval_transform():
  picture = _picture(40, 40)
  options = {"scale": (1, 1), "ratio": (1, 1), "randaugment": None}
  rng = np.random.default_rng(0)
  plain = ops.train_transform(picture, 24, rng, flip=0, **options)
  np.testing.assert_array_equal(plain, ops.eval_transform(picture, 24))
  mirrored = ops.train_transform(picture, 24, rng, flip=1, **options)
  np.testing.assert_array_equal(mirrored, plain[:, ::-1])
  assert mirrored.flags.c_contiguous


def test_train_transform_keeps_an_image_of_the_right_size():
  picture = _picture(64, 64)
  for seed in range(5):
    rng = np.random.default_rng(seed)
    out = ops.train_transform(picture, 64, rng, scale=(1, 1), flip=0, randaugment=None)
    np.testing.assert_array_equal(out, picture)


def test_train_transform_repeats_with_the_generator_and_keeps_its_input():
  picture = _picture(70, 90)
  before = picture.copy()
  outs = [
    ops.train_transform(picture, 32, np.random.default_rng(seed)) for seed in (3, 3, *range(10, 40))
  ]
  np.testing.assert_array_equal(outs[0], outs[1])
  np.testing.assert_array_equal(picture, before)
  assert len({out.tobytes() for out in outs}) == 31
  for out in outs:
    assert out.shape == (32, 32, 3)
    assert out.dtype == np.uint8
    assert out.flags.c_contiguous
