"""The search for images in folders: every file is an image, or is counted and named."""

import io
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from mplug_jax.data import errors
from mplug_jax.data.errors import ImageError
from mplug_jax.data.images import ops
from mplug_jax.data.images.suffixes import IMAGE_SUFFIXES
from mplug_jax.data.sources import caption
from mplug_jax.data.storage import image_folder
from tests.support import tiny_run
from tools import prepare_data


def fill(folder, *names):
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def read(root, split="val"):
  """Returns ({image: captions}, notes) of a split."""
  with errors.noted() as notes:
    source = caption.images({"name": "folder", "image_root": str(root)}, split)
  return {source[i]["image_id"]: source.captions(i) for i in range(len(source))}, notes


def test_every_suffix_of_images_is_read(tmp_path):
  common = ".jpg .jpeg .jpe .jfif .png .webp .avif .bmp .gif .tif .tiff"
  assert set(common.split()) <= set(IMAGE_SUFFIXES)
  names = [f"val/{i}{suffix}" for i, suffix in enumerate(IMAGE_SUFFIXES)] + ["val/A.JFIF"]
  fill(tmp_path, *names)
  captions, notes = read(tmp_path)
  assert sorted(captions) == sorted(names)
  assert notes == []


def test_what_is_skipped_is_counted_and_named_in_one_line(tmp_path):
  fill(tmp_path, "val/a.jpg", "val/a.txt", "val/deep/b.PNG", "val/deep/b.TXT", "val/c.txt")
  fill(
    tmp_path, "val/._a.jpg", "val/.DS_Store", "val/.cache/a.jpg", "val/deep/x.heic", "val/y.HEIC"
  )
  fill(tmp_path, "val/README", "elsewhere/z.jpg")
  (tmp_path / "val/deep/b.TXT").write_text("A cat\n")
  (tmp_path / "val/link").symlink_to(tmp_path / "elsewhere")
  captions, notes = read(tmp_path)
  assert captions == {"val/a.jpg": [], "val/deep/b.PNG": ["a cat"]}
  top = tmp_path / "val"
  assert notes == [
    f"{top}: files are skipped, 4 without the suffix of an image (.heic 2, no suffix 1, .txt 1; "
    f"the first is {top}/README) and 3 hidden (the first is {top}/.DS_Store) and 1 links to "
    f"folders (the first is {top}/link)."
  ]
  for name in ("a.jpg", "b.PNG"):
    next(top.rglob(name)).unlink()
  tiny_run.refused(lambda: read(tmp_path), f"{top} holds no image", f"{top}: files are skipped, 6")


def test_the_check_reports_what_is_skipped(tmp_path, capsys):
  fill(tmp_path, "train/._a.png")
  Image.new("RGB", (8, 8)).save(tmp_path / "train" / "a.png")
  (tmp_path / "train" / "a.txt").write_text("a dog")
  assert prepare_data.main(["check", str(tmp_path), "--task=caption"]) == 0
  out = capsys.readouterr().out
  assert "1: 1 readable, 0 missing" in out
  assert f"warning: {tmp_path}/train: files are skipped, 1 hidden (the first is " in out


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
  def refuse(path):
    raise PermissionError(13, "Permission denied", path)

  monkeypatch.setattr(os, "scandir", refuse)
  with pytest.raises(PermissionError, match=str(tmp_path)):
    image_folder.find_images(str(tmp_path))


@pytest.mark.parametrize("kind", ["AVIF", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats_are_decoded(kind, monkeypatch):
  if kind == "AVIF" and not features.check("avif"):
    pytest.skip("this Pillow has no AVIF")
  file = io.BytesIO()
  Image.new("RGB", (8, 6), (200, 30, 30)).save(file, kind)
  pixels = ops.decode_image(file.getvalue())
  assert pixels.shape == (6, 8, 3)
  assert abs(pixels.mean((0, 1)) - (200, 30, 30)).max() < 8
  # A Pillow without the format.
  monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != kind])
  with pytest.raises(ImageError, match=r"x.avif cannot be read: not an image of a known format\."):
    ops.decode_image(file.getvalue(), "x.avif")


NAME = st.builds(
  "".join,
  st.tuples(
    st.sampled_from(["", "f/", ".h/", "f/g/"]),
    st.sampled_from(["", ".", "._"]),
    st.sampled_from(["a", "b"]),
    st.sampled_from([*IMAGE_SUFFIXES, ".JPG", ".txt", ".pdf", ".jpg.bak", ""]),
  ),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(names=st.sets(NAME, min_size=1, max_size=8))
def test_every_file_is_found_or_skipped(tmp_path_factory, names):
  folder = tmp_path_factory.mktemp("folder")
  files = {str(folder / name) for name in names}
  for path in sorted(files):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, "wb").close()
  listed = image_folder.find_images(str(folder))
  assert sorted([*listed.paths, *listed.hidden, *listed.others]) == sorted(files)
  for path in listed.paths:
    assert path.lower().endswith(IMAGE_SUFFIXES)
    assert "/." not in path.removeprefix(str(folder))
  assert bool(listed.skipped()) == bool(listed.hidden or listed.others)
  assert listed.skipped(used=listed.others) == "" or listed.hidden
