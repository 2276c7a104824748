"""Images in zip and tar archives have the pixels of the files, in threads and processes.

Archives that cannot be read raise an error that names them.
"""

import io
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import ml_collections
import numpy as np
import pytest
from PIL import Image

from mplug_jax.data.errors import ImageError
from mplug_jax.data.images import ops, reader, video
from mplug_jax.data.sources import caption, vqa
from mplug_jax.data.storage import archives, image_paths
from tests.support import paths

NAMES = [f"{folder}/{i}.png" for folder in ("a", "b") for i in range(4)]


def png(seed):
  file = io.BytesIO()
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)).save(
    file, "PNG"
  )
  return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Makes images/ with NAMES, and the same in three archives.

  photos.zip has stored and deflated members; names in dotted.TAR begin with ./.
  """
  top = tmp_path_factory.mktemp("archives")
  with (
    zipfile.ZipFile(top / "photos.zip", "w") as packed,
    tarfile.open(top / "photos.tar", "w") as tar,
    tarfile.open(top / "dotted.TAR", "w", format=tarfile.PAX_FORMAT) as dotted,
  ):
    packed.mkdir("a")
    for i, name in enumerate(NAMES):
      path = top / "images" / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(png(i))
      packed.write(path, name, zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED)
      tar.add(path, name)
      dotted.add(path, f"./{name}")
    tar.add(top / "images" / "a", "a", recursive=False)
    long = tarfile.TarInfo("long/" + "x" * 200 + ".png")
    long.size = len(png(99))
    dotted.addfile(long, io.BytesIO(png(99)))
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.LNKTYPE, NAMES[2]
    tar.addfile(link)
  return top


ROOTS = ["photos.zip", "photos.tar", "dotted.TAR"]


@pytest.mark.parametrize("root", ROOTS)
def test_members_are_the_files(folder, root):
  for name in reversed(NAMES):
    assert archives.open_bytes(folder / root / name) == (folder / "images" / name).read_bytes()
    assert archives.is_file(folder / root / name)
    np.testing.assert_array_equal(
      ops.decode_image(f"{folder}/{root}/{name}"),
      ops.decode_image(folder / "images" / name),
    )
  for name in ("a", "a/9.png", "", "./a/0.png/x"):
    assert not archives.is_file(f"{folder}/{root}/{name}")
  with pytest.raises(FileNotFoundError):
    archives.open_bytes(folder / root / "a/9.png")
  with pytest.raises(ImageError, match=f"Image .*/{root}/a/9.png does not exist"):
    ops.decode_image(f"{folder}/{root}/a/9.png")


def test_links_and_long_names_of_tar(folder):
  assert archives.open_bytes(folder / "photos.tar/link.png") == png(2)
  assert archives.open_bytes(folder / "dotted.TAR/long" / ("x" * 200 + ".png")) == png(99)


def test_files_and_folders_called_like_archives(folder, tmp_path):
  (tmp_path / "a.zip").mkdir()
  shutil.copy(folder / "photos.tar", tmp_path / "a.zip" / "inner.tar")
  (tmp_path / "a.zip" / "x.png").write_bytes(png(1))
  assert archives.split(tmp_path / "a.zip" / "x.png") is None
  assert archives.open_bytes(tmp_path / "a.zip" / "x.png") == png(1)
  assert archives.split(tmp_path / "a.zip/inner.tar/a/0.png") == (
    f"{tmp_path}/a.zip/inner.tar",
    "a/0.png",
  )
  assert archives.open_bytes(tmp_path / "a.zip/inner.tar/a/0.png") == png(0)
  assert archives.split("none.zip/x.png") is None
  assert not archives.is_file("none.zip/x.png")
  with pytest.raises(ImageError, match="Image none.zip/x.png does not exist"):
    ops.decode_image("none.zip/x.png")


def test_a_replaced_archive_is_listed_anew(tmp_path):
  for seed in (1, 2):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
      file.writestr("same.png", png(seed))
      file.writestr(f"{seed}.png", b"x" * seed)
    assert archives.open_bytes(tmp_path / "x.zip/same.png") == png(seed)
    assert archives.open_bytes(tmp_path / f"x.zip/{seed}.png") == b"x" * seed
  assert not archives.is_file(tmp_path / "x.zip/1.png")


# ---- sources


def config(folder, root, rows):
  """config.data of source jsonl, with a question and a caption for every image."""
  path = folder / "rows.jsonl"
  path.write_text(
    "".join(
      f'{{"image": "{row}", "question": "?", "answer": "1", "caption": "it"}}\n' for row in rows
    )
  )
  return ml_collections.ConfigDict(
    {"name": "jsonl", "train_files": [str(path)], "image_root": str(root), "questions_per_image": 1}
  )


@pytest.mark.parametrize(
  ("root", "rows"),
  [
    ("photos.zip", NAMES),
    ("photos.tar", NAMES),
    ("photos.zip/a", ["0.png", "1.png"]),
    ("", [f"photos.tar/{name}" for name in NAMES]),
    ("", ["images/a/0.png", "photos.zip/a/1.png", "dotted.TAR/a/2.png"]),
  ],
)
def test_a_root_or_a_name_may_lead_into_an_archive(folder, tmp_path, root, rows):
  data = config(tmp_path, folder / root, rows)
  for source in (vqa.get(data, "train"), caption.images(data, "train")):
    assert [source[i]["image"] for i in range(len(source))] == [
      str(folder / root / row) for row in rows
    ]
    assert type(source[0]["image"]) is str
    pixels, corrupt = reader.ImageReader(7)(source[1]["image"], "x")
    np.testing.assert_array_equal(pixels, ops.eval_transform(ops.decode_image(png(1)), 7))
    assert not corrupt


def test_an_absolute_name_needs_no_root(folder, tmp_path):
  rows = [str(folder / "photos.zip" / NAMES[0]), str(folder / "images" / NAMES[1])]
  for root in ("", "/elsewhere"):
    source = vqa.get(config(tmp_path, root, rows), "train")
    assert [source[i]["image"] for i in (0, 1)] == rows


@pytest.mark.parametrize("root", ["photos.zip", "photos.tar"])
def test_the_first_members_must_exist(folder, tmp_path, root):
  with pytest.raises(
    FileNotFoundError,
    match=rf"jsonl, line 2: image .*/{root}/c/0.png does not exist; check data.image_root",
  ):
    vqa.get(config(tmp_path, folder / root, ["a/0.png", "c/0.png"]), "train")
  assert len(vqa.get(config(tmp_path, folder / root, NAMES + ["c/0.png"]), "train")) == 9


# ---- threads and processes


def read_all(pickled):
  """{image: sum of its pixels} of a pickled source."""
  source = pickle.loads(pickled)
  return {
    source[i]["image"]: int(ops.decode_image(source[i]["image"]).sum()) for i in range(len(source))
  }


def test_threads_and_other_processes_read_what_one_reads(folder, tmp_path):
  rows = [f"{root}/{name}" for root in ROOTS for name in NAMES]
  pickled = pickle.dumps(vqa.get(config(tmp_path, folder, rows), "train"))
  expected = read_all(pickled)
  assert len(expected) == len(rows)
  with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
    assert pool.submit(read_all, pickled).result() == expected
  archives._indices.clear()  # so that the threads meet archives that nobody has listed
  before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
  with ThreadPoolExecutor(8) as pool:
    assert all(found == expected for found in pool.map(read_all, [pickled] * 32))
  assert before is None or len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_child_reads_though_its_parent_was_listing(folder):
  """A fork while another thread holds the lock leaves the child able to read."""
  code = f"""
import os, threading
from mplug_jax.data.storage import archives
held, done = threading.Event(), threading.Event()
def hold():
  with archives._lock:
    held.set()
    done.wait(20)
threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if not child:
  os._exit(len(archives.open_bytes({str(folder / "photos.tar" / NAMES[0])!r})) % 256)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
done.set()
"""
  result = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", code],
    cwd=paths.ROOT,
    capture_output=True,
    text=True,
    timeout=15,
    check=False,
  )
  assert result.stdout == f"{len(png(0)) % 256}\n", result.stderr


# ---- what cannot be read


def test_compressed_tars_are_refused(folder, tmp_path):
  for name, mode in (
    ("x.tar.gz", "w:gz"),
    ("x.tgz", "w:gz"),
    ("x.tar.bz2", "w:bz2"),
    ("x.tar.xz", "w:xz"),
    ("called.tar", "w:gz"),
  ):
    with tarfile.open(tmp_path / name, mode) as file:
      file.add(folder / "images/a/0.png", "0.png")
    with pytest.raises(
      ValueError,
      match=rf"line 1: .*/{name} is a compressed tar, .*: unpack it, or pack its files as zip\.$",
    ) as error:
      vqa.get(config(tmp_path, tmp_path / name, ["0.png"]), "train")
    assert "\n" not in str(error.value)
    with pytest.raises(
      ImageError,
      match=f"Image .*{name}/0.png cannot be read: .*{name} is a compressed tar",
    ):
      ops.decode_image(tmp_path / name / "0.png")


@pytest.mark.parametrize(("name", "kind"), [("photos.zip", "zip"), ("photos.tar", "tar")])
def test_what_is_no_archive_or_is_cut_off(folder, tmp_path, name, kind):
  whole = (folder / name).read_bytes()
  for i, content in enumerate((b"no archive at all " * 50, whole[:700], whole[:-10_300], b"")):
    path = tmp_path / f"{i}.{kind}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{i}.{kind} is not a {kind} file, or is cut off \("):
      archives.open_bytes(path / NAMES[0])


def test_damaged_members(folder, tmp_path):
  whole = bytearray((folder / "photos.zip").read_bytes())
  with zipfile.ZipFile(folder / "photos.zip") as file:
    stored, deflated = (file.getinfo(name).header_offset + 60 for name in NAMES[:2])
  whole[stored] ^= 1
  whole[deflated : deflated + 20] = b"\xff" * 20
  (tmp_path / "x.zip").write_bytes(whole)
  for name in NAMES[:2]:
    with pytest.raises(
      ImageError,
      match=f"Image .*x.zip/{name} cannot be read: {name} in .*/x.zip is damaged",
    ):
      ops.decode_image(tmp_path / "x.zip" / name)
  assert archives.open_bytes(tmp_path / "x.zip" / NAMES[2]) == png(2)


def test_members_that_are_packed_or_locked_otherwise(tmp_path):
  with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
    file.writestr("a.png", png(0), zipfile.ZIP_BZIP2)
    file.writestr("b.png", png(0))
  with pytest.raises(
    ValueError,
    match=r"a.png in .*/x.zip is packed by method 12 of zip; only stored and deflated files are "
    r"read\.",
  ):
    archives.open_bytes(tmp_path / "x.zip/a.png")
  data = bytearray((tmp_path / "x.zip").read_bytes())
  data[data.rindex(b"PK\x01\x02") + 8] |= 1  # the flag of the last member in the directory
  (tmp_path / "locked.zip").write_bytes(data)
  with pytest.raises(ValueError, match=r"b.png in .*/locked.zip is encrypted"):
    archives.open_bytes(tmp_path / "locked.zip/b.png")


# ---- clips


def test_clips_inside_an_archive(tmp_path):
  clip = np.zeros((4, 16, 16, 3), np.uint8)
  clip[:, :, 8:] = (np.arange(4) * 60)[:, None, None, None]
  video.write_mp4(tmp_path / "x.mp4", clip)
  with zipfile.ZipFile(tmp_path / "clips.zip", "w") as file:
    file.write(tmp_path / "x.mp4", "x.mp4")
    file.writestr("bad.mp4", b"no video")
  inside, outside = (
    video.read_clip(path, 4) for path in (tmp_path / "clips.zip/x.mp4", tmp_path / "x.mp4")
  )
  np.testing.assert_array_equal(inside, outside)
  for name, message in (
    ("bad.mp4", "cannot be read: no frame can be decoded"),
    ("none.mp4", "does not exist"),
  ):
    with pytest.raises(ImageError, match=f"Video .*clips.zip/{name} {message}"):
      video.read_clip(tmp_path / "clips.zip" / name, 4)
  (tmp_path / "cut.zip").write_bytes(b"PK")
  with pytest.raises(
    ImageError,
    match="Video .*cut.zip/x.mp4 cannot be read: .*cut.zip is not a zip file, or is cut off",
  ):
    video.read_clip(tmp_path / "cut.zip/x.mp4", 4)


def test_image_paths_locate_an_archive_that_cannot_be_used(tmp_path):
  (tmp_path / "x.zip").write_bytes(b"PK")
  with pytest.raises(ValueError, match="f.json, entry 1: .*x.zip is not a zip file"):
    image_paths.ImagePaths()(str(tmp_path), "image_root", "x.zip/a.png", "f.json, entry 1")
